//! What is written to guest memory, by whomever, for all who want to know.
//!
//! KVM's log empties as it is read, so whoever reads it reads it for everyone: each reader has a
//! set of pages that it has not asked for yet, and what comes from KVM, or is noted by somebody
//! who wrote, goes into all of them. One lock is held from the reading of KVM's log to the
//! clearing of it: two that did so at a time would clear what the other has not seen.
//!
//! Devices have a log each, which is emptied like KVM's: a page is marked before it is written,
//! and once more after. What was taken from it since the devices stood still last is remembered:
//! of a process that dies the second mark is missing, so that for its successor all of that counts
//! as written once more.
//!
//! | reader | since when |
//! |---|---|
//! | snapshots ([`Tracker`](super::dirty::Tracker)) | the first that needs it, to the VM's end |
//! | a plugin with the right to control | from when it asks to when it leaves |
//!
//! KVM logs while there is a reader.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cellblock_devices::protocol::write_log::WriteLog;
use cellblock_wire::ShmError;

use super::format::{CHUNK, PAGE};
use crate::vm::kvm::{KvmError, Machine};
use crate::vm::memory::GuestRam;

/// Names a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reader(u64);

/// Names a write that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Writing(u64);

/// All logs of a VM's memory. Sets of pages have a word for each chunk of a snapshot, in the order
/// of guest memory's file.
#[derive(Debug)]
pub struct WriteLogs {
    pub(super) memory: u64,
    /// By id of the device.
    devices: Mutex<Devices>,
    readers: Mutex<Readers>,
    /// A write ended.
    ended: Condvar,
    /// Somebody may write who does not say so.
    untold: AtomicBool,
}

type Devices = BTreeMap<String, Device>;

#[derive(Debug)]
struct Device {
    log: WriteLog,
    /// What its processes map.
    fd: Arc<OwnedFd>,
    /// Marks taken since it stood still.
    taken: Vec<u64>,
}

#[derive(Debug, Default)]
struct Readers {
    next: u64,
    /// What each has not asked for yet.
    unread: BTreeMap<Reader, Vec<u64>>,
    /// Writes that have begun and have not ended: bytes of guest memory's file.
    open: BTreeMap<Writing, (u64, u64)>,
    /// None may begin.
    held: bool,
}

impl WriteLogs {
    /// For a VM with so many bytes of memory.
    pub fn new(memory: u64) -> WriteLogs {
        WriteLogs {
            memory,
            devices: Mutex::default(),
            readers: Mutex::default(),
            ended: Condvar::new(),
            untold: AtomicBool::new(false),
        }
    }

    /// Number of chunks, which is the length of every set of pages.
    pub fn chunks(&self) -> usize {
        (self.memory / CHUNK as u64) as usize
    }

    /// The log of a device, for one more process of it, when all that the one before did is over:
    /// how much memory it is for, and what to map.
    pub fn issue(&self, name: &str) -> Result<(u64, Arc<OwnedFd>), ShmError> {
        let mut readers = self.readers();
        let mut devices = self.devices();
        if let Some(device) = devices.get(name) {
            readers.note(&device.taken);
            return Ok((self.memory, device.fd.clone()));
        }
        let (log, fd) = WriteLog::new(self.memory)?;
        let (fd, taken) = (Arc::new(fd), vec![0; self.chunks()]);
        devices.insert(name.to_string(), Device { log, fd: fd.clone(), taken });
        Ok((self.memory, fd))
    }

    /// One more reader, for which nothing was written before. KVM logs from the first on.
    pub fn join(&self, machine: &Machine) -> Result<Reader, KvmError> {
        let mut readers = self.readers();
        if readers.unread.is_empty() {
            machine.log_dirty_pages(true)?;
        }
        // KVM has all pages in its log at first; and what comes from before is for the others.
        let read = self.take_all(machine).inspect(|pages| readers.note(pages));
        if let Err(error) = read {
            readers.stop_if_alone(machine)?;
            return Err(error);
        }
        let reader = Reader(readers.number());
        readers.unread.insert(reader, vec![0; self.chunks()]);
        Ok(reader)
    }

    /// A reader goes. With the last one KVM's log ends.
    pub fn leave(&self, machine: &Machine, reader: Reader) -> Result<(), KvmError> {
        let mut readers = self.readers();
        match readers.unread.remove(&reader) {
            Some(_) => readers.stop_if_alone(machine),
            None => Ok(()),
        }
    }

    /// What was written since the reader last asked.
    pub fn read(&self, machine: &Machine, reader: Reader) -> Result<Vec<u64>, KvmError> {
        // One lock from the reading of the logs to the clearing of them.
        let mut readers = self.readers();
        readers.take(&self.take_all(machine)?, reader, self.chunks())
    }

    /// What the logs have, which are empty then. With the readers locked.
    fn take_all(&self, machine: &Machine) -> Result<Vec<u64>, KvmError> {
        let mut pages = machine.take_dirty_pages()?;
        self.take_devices(&mut pages);
        Ok(pages)
    }

    fn take_devices(&self, pages: &mut [u64]) {
        for Device { log, taken, .. } in self.devices().values_mut() {
            log.take(|n, bits| {
                if let (Some(page), Some(taken)) = (pages.get_mut(n), taken.get_mut(n)) {
                    *page |= bits;
                    *taken |= bits;
                }
            });
        }
    }

    /// Device processes stand still, and what they marked has been taken: nothing that was begun
    /// is to be ended by another process.
    pub(super) fn at_rest(&self) {
        self.devices().values_mut().for_each(|device| device.taken.fill(0));
    }

    /// These pages were written, all but `reader` have to know.
    pub(super) fn note(&self, pages: &[u64], reader: Option<Reader>) {
        self.readers().note_others(pages, reader);
    }

    /// The VMM wrote `len` bytes at guest-physical `gpa`.
    pub fn wrote(&self, ram: &GuestRam, gpa: u64, len: u64) {
        let region = ram.regions().iter().find(|r| gpa >= r.gpa && gpa - r.gpa < r.len);
        let Some(region) = region else { return };
        let start = region.offset + (gpa - region.gpa);
        self.readers().note_bytes(start, len.min(region.offset + region.len - start));
    }

    /// Somebody is going to write `len` bytes at `offset` of guest memory's file. Until
    /// [`WriteLogs::written`] they are in all that is read: a write that is seen by nobody at the
    /// time of a look is seen by the next. `None` while writes are held.
    pub fn writing(&self, offset: u64, len: u64) -> Option<Writing> {
        let mut readers = self.readers();
        if readers.held {
            return None;
        }
        let writing = Writing(readers.number());
        readers.open.insert(writing, (offset, len));
        Some(writing)
    }

    /// It has, or is gone.
    pub fn written(&self, writing: Writing) {
        let mut readers = self.readers();
        if let Some((offset, len)) = readers.open.remove(&writing) {
            readers.note_bytes(offset, len);
            self.ended.notify_all();
        }
    }

    /// Lets no write begin any more, and waits for the end of those that have. False where one
    /// has not ended in time; [`WriteLogs::let_go`] is to follow all the same.
    pub fn hold(&self, until: Instant) -> bool {
        let mut readers = self.readers();
        readers.held = true;
        while !readers.open.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.ended.wait_timeout(readers, left);
            readers = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets writes begin again.
    pub fn let_go(&self) {
        self.readers().held = false;
    }

    /// From now on there may be writes that nobody tells of.
    pub fn lose_track(&self) {
        self.untold.store(true, Ordering::Release);
    }

    /// Whether every write is told of.
    pub fn is_complete(&self) -> bool {
        !self.untold.load(Ordering::Acquire)
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Readers {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn note(&mut self, pages: &[u64]) {
        self.note_others(pages, None);
    }

    fn note_others(&mut self, pages: &[u64], but: Option<Reader>) {
        let others = self.unread.iter_mut().filter(|(reader, _)| Some(**reader) != but);
        others.for_each(|(_, unread)| add(unread, pages));
    }

    fn note_bytes(&mut self, offset: u64, len: u64) {
        self.unread.values_mut().for_each(|unread| mark(unread, offset, len));
    }

    /// `pages` come from KVM; the reader gets its own.
    fn take(&mut self, pages: &[u64], reader: Reader, chunks: usize) -> Result<Vec<u64>, KvmError> {
        self.note(pages);
        let empty = vec![0; chunks];
        let mut own = match self.unread.get_mut(&reader) {
            Some(unread) => std::mem::replace(unread, empty),
            None => empty,
        };
        self.open.values().for_each(|(offset, len)| mark(&mut own, *offset, *len));
        Ok(own)
    }

    fn stop_if_alone(&self, machine: &Machine) -> Result<(), KvmError> {
        if self.unread.is_empty() { machine.log_dirty_pages(false) } else { Ok(()) }
    }
}

/// Adds a set of pages to another.
pub(super) fn add(to: &mut [u64], pages: &[u64]) {
    to.iter_mut().zip(pages).for_each(|(to, new)| *to |= *new);
}

/// Adds the pages of `len` bytes at `offset` of guest memory's file.
pub(super) fn mark(pages: &mut [u64], offset: u64, len: u64) {
    let Some(last) = len.checked_sub(1) else { return };
    let end = (pages.len() as u64 * 64).saturating_sub(1);
    let last = offset.saturating_add(last) / PAGE as u64;
    for page in offset / PAGE as u64..=last.min(end) {
        pages[(page / 64) as usize] |= 1 << (page % 64);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// Two readers of a log of 128 pages.
    fn two() -> (Readers, Reader, Reader) {
        let mut readers = Readers::default();
        let (one, two) = (Reader(readers.number()), Reader(readers.number()));
        for reader in [one, two] {
            readers.unread.insert(reader, vec![0; 2]);
        }
        (readers, one, two)
    }

    #[test]
    fn what_one_reads_the_other_still_gets() {
        let (mut readers, one, two) = two();
        let mut take = |pages: [u64; 2], reader| readers.take(&pages, reader, 2).unwrap();
        assert_eq!(take([0b1, 0], one), [0b1, 0]);
        assert_eq!(take([0b10, 1], one), [0b10, 1]);
        assert_eq!(take([0, 0], one), [0, 0]);
        assert_eq!(take([0b100, 0], two), [0b111, 1]);
        assert_eq!(take([0, 0], one), [0b100, 0]);
        assert_eq!(take([1, 1], Reader(99)), [0, 0]);
    }

    #[test]
    fn what_somebody_notes_is_everybodys_but_the_one_that_is_left_out() {
        let (mut readers, one, two) = two();
        readers.note_others(&[0b1000, 0], Some(one));
        readers.note_bytes(4095, 2);
        assert_eq!(readers.take(&[0, 0], one, 2).unwrap(), [0b11, 0]);
        assert_eq!(readers.take(&[0, 0], two, 2).unwrap(), [0b1011, 0]);
    }

    /// Between its begin and its end a write can be on either side of a look.
    #[test]
    fn a_write_under_way_is_in_every_look() {
        let logs = WriteLogs::new(2 * CHUNK as u64);
        let (readers, one, _) = two();
        *logs.readers() = readers;
        let writing = logs.writing(65 * PAGE as u64, 1).unwrap();
        let take = || logs.readers().take(&[0, 0], one, 2).unwrap();
        assert_eq!((take(), take()), (vec![0, 2], vec![0, 2]));
        logs.written(writing);
        assert_eq!((take(), take()), (vec![0, 2], vec![0, 0]));
        logs.written(writing);
        assert_eq!(take(), [0, 0]);
    }

    /// What a process wrote that died is told as if it lived, and its log is kept once.
    #[test]
    fn the_log_is_the_devices_whatever_becomes_of_its_processes() {
        let logs = WriteLogs::new(2 * CHUNK as u64);
        for page in 0..10 {
            let (memory, fd) = logs.issue("disk0").expect("log");
            let process = WriteLog::map(fd.as_fd(), memory).expect("map");
            process.mark(page * PAGE as u64, 1);
        }
        let (memory, other) = logs.issue("disk1").expect("log");
        WriteLog::map(other.as_fd(), memory).expect("map").mark(64 * PAGE as u64, 1);
        let taken = || {
            let mut pages = [0; 2];
            logs.take_devices(&mut pages);
            pages
        };
        assert_eq!(taken(), [0x3ff, 1]);
        assert_eq!(taken(), [0, 0]);
        assert_eq!(logs.devices().len(), 2);
    }

    /// A process that died may have written what it had marked, after the mark was taken.
    #[test]
    fn what_a_process_marked_that_died_counts_once_more() {
        let logs = WriteLogs::new(CHUNK as u64);
        let reader = {
            let mut readers = logs.readers();
            let reader = Reader(readers.number());
            readers.unread.insert(reader, vec![0]);
            reader
        };
        let take = || {
            let mut pages = [0];
            logs.take_devices(&mut pages);
            logs.readers().take(&pages, reader, 1).unwrap()[0]
        };
        let (memory, fd) = logs.issue("disk0").expect("log");
        let process = WriteLog::map(fd.as_fd(), memory).expect("map");
        process.mark(0, 1);
        logs.at_rest(); // not taken yet
        assert_eq!((take(), take()), (1, 0));
        process.mark(PAGE as u64, 1);
        assert_eq!((take(), take()), (0b10, 0));
        logs.issue("disk0").expect("log");
        assert_eq!((take(), take()), (0b11, 0));
        logs.at_rest();
        logs.issue("disk0").expect("log");
        assert_eq!(take(), 0);
    }

    #[test]
    fn who_holds_writes_waits_for_those_that_have_begun() {
        let logs = &WriteLogs::new(CHUNK as u64);
        let soon = || Instant::now() + std::time::Duration::from_millis(20);
        let writing = logs.writing(0, 1).unwrap();
        assert!(!logs.hold(soon()));
        assert_eq!(logs.writing(0, 1), None);
        std::thread::scope(|scope| {
            let late = Instant::now() + std::time::Duration::from_secs(60);
            let waits = scope.spawn(move || logs.hold(late));
            logs.written(writing);
            assert!(waits.join().unwrap());
        });
        assert!(logs.hold(soon()) && logs.writing(0, 1).is_none());
        logs.let_go();
        assert!(logs.writing(0, 1).is_some());
    }

    #[test]
    fn pages_stay_within_memory() {
        let mut pages = [0; 2];
        mark(&mut pages, 63 << 12, 4097);
        assert_eq!(pages, [1 << 63, 1]);
        mark(&mut pages, 127 << 12, u64::MAX);
        mark(&mut pages, u64::MAX, 9);
        mark(&mut pages, 5, 0);
        assert_eq!(pages, [1 << 63, 1 | 1 << 63]);
    }
}
