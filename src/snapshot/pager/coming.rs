//! The chunk that is on its way, for those who have to know which chunks are absent as a whole.
//!
//! A chunk appears page by page, and the guest may write to the first of them while the last is
//! still to come. Who reads what is not there from the snapshot must not take such a chunk for
//! absent: the guest's write would be lost. The order that makes this so:
//!
//! | pager | who copies |
//! |---|---|
//! | 1. the chunk is named here | a. the log of what is written begins anew |
//! | 2. its pages come | b. [`Coming::settle`] |
//! | 3. it is said to be there | c. what is not said to be there is read from the snapshot |
//! | 4. nothing is named here | |
//!
//! A write to a page of step 2 that the log forgets at a is one that b finds named; then c comes
//! after 3. A write after a is in the log.

#[cfg(loom)]
use loom::{sync::atomic::AtomicU64, thread::yield_now};
#[cfg(not(loom))]
use std::{sync::atomic::AtomicU64, thread::yield_now};

use std::sync::atomic::Ordering::SeqCst;

/// See the module.
#[derive(Debug)]
pub(super) struct Coming {
    /// Counted from 1; 0 while none is.
    chunk: AtomicU64,
}

impl Coming {
    pub(super) fn new() -> Coming {
        Coming { chunk: AtomicU64::new(0) }
    }

    /// Has `fill` bring chunk `index`, and then `there` say that it is there. One that fails on
    /// the way is on its way for ever.
    pub(super) fn bring<E>(
        &self,
        index: usize,
        fill: impl FnOnce() -> Result<(), E>,
        there: impl FnOnce(),
    ) -> Result<(), E> {
        self.chunk.store(index as u64 + 1, SeqCst);
        fill()?;
        there();
        self.chunk.store(0, SeqCst);
        Ok(())
    }

    /// Waits until a chunk that is on its way is there. What is absent afterwards was so when this
    /// was called, all of it. False where one never will be whole, because the pager has `ended`.
    pub(super) fn settle(&self, ended: impl Fn() -> bool) -> bool {
        let coming = self.chunk.load(SeqCst);
        while coming != 0 && self.chunk.load(SeqCst) == coming {
            // Asked before the next look: it may have ended with the last chunk.
            if ended() && self.chunk.load(SeqCst) == coming {
                return false;
            }
            yield_now();
        }
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_that_fails_on_its_way_is_never_there() {
        let coming = Coming::new();
        assert!(coming.settle(|| true));
        coming.bring(3, || Ok::<_, ()>(()), || ()).unwrap();
        assert!(coming.settle(|| true));
        coming.bring(0, || Err(()), || panic!("it is not")).unwrap_err();
        assert!(!coming.settle(|| true));
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    const ABSENT: u8 = 0;
    const AS_IN_SNAPSHOT: u8 = 1;
    const WRITTEN: u8 = 2;

    struct Memory {
        coming: Coming,
        first: AtomicU8,
        there: AtomicBool,
        /// KVM's log: marked with the write, cleared under the same lock.
        log: Mutex<bool>,
    }

    /// The pager brings a chunk, the guest writes to its first page, and a round of a copy is made,
    /// in every order. What the copy has of the page is what memory has, or the log says that it is
    /// to be copied again.
    fn check(settles: bool) {
        loom::model(move || {
            let memory = Arc::new(Memory {
                coming: Coming::new(),
                first: AtomicU8::new(ABSENT),
                there: AtomicBool::new(false),
                log: Mutex::new(false),
            });
            let own = memory.clone();
            let pager = thread::spawn(move || {
                let fill = || {
                    own.first.store(AS_IN_SNAPSHOT, Ordering::Release);
                    Ok::<_, ()>(()) // the other pages
                };
                own.coming.bring(7, fill, || own.there.store(true, Ordering::Release)).unwrap();
            });
            let own = memory.clone();
            let guest = thread::spawn(move || {
                if own.first.load(Ordering::Acquire) != ABSENT {
                    let mut log = own.log.lock().unwrap();
                    *log = true;
                    own.first.store(WRITTEN, Ordering::Release);
                }
            });
            *memory.log.lock().unwrap() = false;
            assert!(!settles || memory.coming.settle(|| false));
            let copy = match memory.there.load(Ordering::Acquire) {
                true => memory.first.load(Ordering::Acquire),
                false => AS_IN_SNAPSHOT,
            };
            pager.join().unwrap();
            guest.join().unwrap();
            let again = *memory.log.lock().unwrap();
            let is = memory.first.load(Ordering::Acquire);
            assert!(again || copy == is, "the copy has {copy}, memory {is}");
        });
    }

    #[test]
    fn no_write_to_a_chunk_on_its_way_is_lost() {
        check(true);
    }

    #[test]
    #[should_panic(expected = "the copy has 1, memory 2")]
    fn without_settling_one_is() {
        check(false);
    }
}
