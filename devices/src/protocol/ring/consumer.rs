//! The device's side of the register ring: one thread that takes accesses out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use cellblock_wire::{Mapping, futex};

use super::{KIND_READ, KIND_WRITE, MAX_VCPUS, Page, RingError, SLOTS, TICKETS, reply_word};

/// One register access of the guest.
#[derive(Debug)]
pub enum Access {
    /// The guest wrote `value` to register `offset`.
    Write {
        /// Register, from the device's first.
        offset: u8,
        /// The byte.
        value: u8,
    },
    /// The guest reads register `offset`; a vCPU waits for [`Consumer::reply`].
    Read {
        /// Register, from the device's first.
        offset: u8,
        /// Whom to answer.
        reply: Reply,
    },
}

/// The address of an answer: a vCPU and the ticket of its read.
#[derive(Debug)]
pub struct Reply {
    vcpu: usize,
    ticket: u32,
}

impl Reply {
    /// The vCPU and the ticket.
    pub fn parts(&self) -> (usize, u32) {
        (self.vcpu, self.ticket)
    }

    /// What [`Reply::parts`] gave; `None` for what it cannot have given.
    pub fn from_parts(vcpu: usize, ticket: u32) -> Option<Reply> {
        let fits = vcpu < MAX_VCPUS && (1..TICKETS).contains(&ticket);
        fits.then_some(Reply { vcpu, ticket })
    }
}

/// The ring holds something that no VMM of ours writes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Corrupt {
    /// More entries are claimed to be published than the ring holds.
    #[error("register ring claims entries from {head} to {tail}, more than it holds")]
    Tail {
        /// Where this side stands.
        head: u32,
        /// What the page says.
        tail: u32,
    },
    /// An entry is neither a read nor a write.
    #[error("register ring entry {0:#018x} is not an access")]
    Entry(u64),
}

/// The consuming end of a register ring.
pub struct Consumer {
    page: Page,
    doorbell: OwnedFd,
    head: u32,
    tail: u32,
    /// An access was taken out and is being carried out; `head` still names it.
    busy: bool,
    /// `head` moved since waiting vCPUs were last thought of.
    freed: bool,
}

impl Consumer {
    /// Takes over the consuming end, at the first access not committed so far.
    /// `doorbell` is the eventfd that the VMM rings after a sleep.
    pub fn new(mapping: Mapping, doorbell: OwnedFd) -> Result<Consumer, RingError> {
        let page = Page::new(mapping)?;
        let head = page.head().load(Ordering::Acquire);
        Ok(Consumer { page, doorbell, head, tail: head, busy: false, freed: false })
    }

    /// Commits the access taken out before, and takes out the next one, if any.
    #[expect(clippy::should_implement_trait, reason = "an iterator would end at the first None")]
    pub fn next(&mut self) -> Result<Option<Access>, Corrupt> {
        self.commit();
        if self.head == self.tail {
            // Acquire: the entries up to the tail are there.
            let tail = self.page.tail().load(Ordering::Acquire);
            if tail.wrapping_sub(self.head) > SLOTS {
                return Err(Corrupt::Tail { head: self.head, tail });
            }
            self.tail = tail;
            if self.head == tail {
                if self.freed {
                    self.wake_writers();
                }
                return Ok(None);
            }
        }
        let entry = self.page.entry(self.head).load(Ordering::Relaxed);
        let [vcpu, kind, offset, value] = (entry as u32).to_be_bytes();
        let (vcpu, ticket) = (usize::from(vcpu), (entry >> 32) as u32);
        let access = match kind {
            KIND_WRITE => Access::Write { offset, value },
            KIND_READ if vcpu < MAX_VCPUS && (1..TICKETS).contains(&ticket) => {
                Access::Read { offset, reply: Reply { vcpu, ticket } }
            }
            _ => return Err(Corrupt::Entry(entry)),
        };
        self.busy = true;
        Ok(Some(access))
    }

    /// Accesses carried out so far, that taken out last among them.
    pub fn position(&self) -> u32 {
        self.head.wrapping_add(self.busy.into())
    }

    /// Goes on behind the access that a process before this one had carried out when it
    /// died. Only the first one can be that.
    pub fn resume(&mut self, position: u32) {
        let published = self.page.tail().load(Ordering::Acquire).wrapping_sub(self.head);
        if position == self.head.wrapping_add(1) && (1..=SLOTS).contains(&published) {
            self.tail = position;
            self.busy = true;
            self.commit();
        }
    }

    /// Answers a read.
    pub fn reply(&mut self, reply: Reply, value: u8) {
        let word = self.page.reply(reply.vcpu);
        word.store(reply_word(reply.ticket, value), Ordering::Release);
        fence(Ordering::SeqCst);
        if self.page.reader_sleeps(reply.vcpu).load(Ordering::Relaxed) != 0 {
            futex::wake_shared(word);
            // A vCPU that slept while this thread was awake may be waiting for this
            // very CPU; watching the ring now would keep it from it.
            std::thread::yield_now();
        }
    }

    /// Commits the access taken out last, and says whether the ring is empty. If it
    /// is, the next access rings the doorbell, until [`Consumer::awake`].
    pub fn prepare_sleep(&mut self) -> bool {
        self.commit();
        if self.freed {
            self.wake_writers();
        }
        self.page.sleeping().store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let empty = self.page.tail().load(Ordering::Relaxed) == self.head;
        if !empty {
            self.page.sleeping().store(0, Ordering::Relaxed);
        }
        empty
    }

    /// Ends a sleep: the doorbell is not needed for now, and is silenced if
    /// it `rang`.
    pub fn awake(&mut self, rang: bool) {
        self.page.sleeping().store(0, Ordering::Relaxed);
        if rang {
            // It was readable, and nobody else reads it.
            let _ = nix::unistd::read(&self.doorbell, &mut [0; 8]);
        }
    }

    fn commit(&mut self) {
        if !self.busy {
            return;
        }
        self.busy = false;
        self.freed = true;
        self.head = self.head.wrapping_add(1);
        self.page.head().store(self.head, Ordering::Release);
        // Waking a writer at every free slot would make the two take turns.
        if self.tail.wrapping_sub(self.head) == SLOTS / 2 {
            self.wake_writers();
        }
    }

    fn wake_writers(&mut self) {
        self.freed = false;
        fence(Ordering::SeqCst);
        let full = self.page.full();
        // A writer that sets the word between the swap and the wake-up either sleeps
        // already, and is woken, or finds in the kernel that `head` has moved.
        if full.load(Ordering::Relaxed) != 0 && full.swap(0, Ordering::SeqCst) != 0 {
            futex::wake_shared(self.page.head());
        }
    }
}

/// The doorbell: readable when an access came during a sleep.
impl AsFd for Consumer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}
