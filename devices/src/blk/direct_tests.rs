use super::*;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::blk::clear::{Clear, Range};
use crate::blk::engine::{Engine, Job, SyncEngine, Uring, UringEngine};
use crate::blk::execute::Disk;
use crate::blk::memory::Memory;
use crate::blk::request::Operation;
use crate::blk::view::View;
use crate::protocol::write_log::WriteLog;

const SIZE: u64 = 64 << 10;
/// Guest memory, and where its status bytes are.
const MEMORY: u64 = 1 << 20;
const STATUS: u64 = MEMORY - 4096;

/// Folders of file systems that have O_DIRECT: the usual one, and memory.
fn folders() -> Vec<PathBuf> {
    [std::env::temp_dir(), "/dev/shm".into()]
        .into_iter()
        .filter(|dir| {
            let file = tempfile::NamedTempFile::new_in(dir).expect("file");
            open(file.path()).is_ok()
        })
        .collect()
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

/// A disk without a page cache whose blocks are said to be `block`, or what they are.
fn disk(folder: &Path, block: Option<u32>) -> (Disk, tempfile::NamedTempFile) {
    let image = tempfile::NamedTempFile::new_in(folder).expect("file");
    image.as_file().write_all_at(&vec![0x11; SIZE as usize], 0).expect("fill");
    let file = open(image.path()).expect("open");
    let real = Direct::of(&file).expect("examined").expect("direct");
    let direct = block.map_or(real, |block| Direct::new(block, block).expect("rules"));
    let disk = Disk {
        file,
        size: SIZE,
        block_size: 4096,
        read_only: false,
        id: Default::default(),
        direct: Some(direct),
        overlay: None,
    };
    (disk, image)
}

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory")
}

fn content(image: &tempfile::NamedTempFile) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    image.as_file().read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

/// Begins a request over `parts` of guest memory and waits for its end.
fn request<'m>(
    engine: &mut impl Engine<'m>,
    memory: &'m Memory,
    operation: Operation,
    parts: &[(u64, usize)],
    ranges: &[Range],
) -> Result<u64, ExecuteError> {
    let slice = |at, len| GuestMemoryBackend::get_slice(memory, GuestAddress(at), len);
    let data: Vec<_> = parts.iter().map(|(at, len)| slice(*at, *len).expect("slice")).collect();
    let bytes = data.iter().map(|slice| slice.len() as u64).sum();
    let status = slice(STATUS, 1).expect("slice");
    let job = Job { head: 0, status, writable: 0, operation, bytes };
    let mut done = engine.begin(job, &data, ranges).expect("begin");
    while done.is_none() {
        engine.submit().expect("submit");
        engine.wait().expect("wait");
        done = engine.reap();
    }
    let done = done.expect("done");
    done.result.map(|()| done.filled)
}

/// Runs `test` on both engines over `disk`.
fn on_both(
    disk: &Disk,
    test: impl Fn(
        &mut dyn FnMut(Operation, &[(u64, usize)], &[Range]) -> Result<u64, ExecuteError>,
        &Memory,
    ),
) {
    let guest = memory();
    let view = View::new(&guest).expect("view");
    let mut sync = SyncEngine::new(disk, &view, false);
    test(
        &mut |operation, parts, ranges| request(&mut sync, &guest, operation, parts, ranges),
        &guest,
    );
    let mut uring = Uring::new(disk, None).expect("io_uring");
    let mut engine = UringEngine::new(&mut uring, disk, &view, false);
    test(
        &mut |operation, parts, ranges| request(&mut engine, &guest, operation, parts, ranges),
        &guest,
    );
}

#[test]
fn a_file_says_how_it_wants_to_be_read() {
    let plain = tempfile::tempfile().expect("file");
    assert!(Direct::of(&plain).expect("examined").is_none());
    for folder in folders() {
        let (disk, _image) = disk(&folder, None);
        let direct = disk.direct.expect("direct");
        assert!(direct.block.is_power_of_two() && direct.block >= SECTOR, "{direct:?}");
        assert_eq!(direct.turns.is_some(), direct.block > SECTOR);
    }
    assert!(Direct::new(3, 512).is_err() && Direct::new(512, 0).is_err());
    assert!(Direct::new(512, MAX_BLOCK * 2).is_err());
}

#[test]
fn what_fits_is_told_from_what_does_not() {
    let guest = memory();
    let direct = Direct::new(512, 4096).expect("rules");
    let fits = |offset, parts: &[(u64, usize)]| {
        let slice = |(at, len): &(u64, usize)| {
            GuestMemoryBackend::get_slice(&guest, GuestAddress(*at), *len).expect("slice")
        };
        direct.fits(offset, &parts.iter().map(slice).collect::<Vec<_>>())
    };
    assert!(fits(8192, &[(512, 4096), (0x2000, 8192)]));
    assert!(!fits(512, &[(512, 4096)]), "offset");
    assert!(!fits(0, &[(256, 4096)]), "memory");
    assert!(!fits(0, &[(512, 512)]), "length");
    assert!(!fits(0, &[(512, 4096), (8192, 2048), (16384, 2048)]), "a part's length");
    assert!(direct.is_partial(512, 4096) && direct.is_partial(0, 512));
    assert!(!direct.is_partial(4096, 8192));
}

#[test]
fn large_requests_go_over_the_buffer_in_pieces() {
    let folder = std::env::temp_dir();
    let image = tempfile::NamedTempFile::new_in(&folder).expect("file");
    let size = 3 * CHUNK;
    image.as_file().set_len(size).expect("size");
    let file = open(image.path()).expect("open");
    let direct = Direct::new(4096, 4096).expect("rules");
    let mut bounce = Bounce::default();
    let (from, bytes) = (512, 2 * CHUNK + 5 * 512);
    let mut next = 0u64;
    let fill = |into: &mut [u8]| {
        for byte in into {
            (*byte, next) = ((next % 251) as u8, next + 1);
        }
        Ok(())
    };
    bounce.write((&file, &direct), from, bytes, true, fill).expect("write");
    let mut found = vec![0; size as usize];
    image.as_file().read_exact_at(&mut found, 0).expect("read");
    for (at, byte) in (0u64..).zip(&found) {
        let inside = (from..from + bytes).contains(&at);
        assert_eq!(*byte, if inside { ((at - from) % 251) as u8 } else { 0 }, "byte {at}");
    }
}

#[test]
fn an_image_that_shrank_is_an_error_and_not_zeros() {
    for folder in folders() {
        let (disk, image) = disk(&folder, Some(4096));
        image.as_file().set_len(8192).expect("truncate");
        on_both(&disk, |request, _| {
            for parts in [&[(1, 4096)][..], &[(4096, 4096)], &[(0, 512)]] {
                let error = request(Operation::Read(8192), parts, &[]).expect_err("beyond the end");
                assert!(matches!(error, ExecuteError::EndOfFile(_)), "{error:?}");
            }
            request(Operation::Write(8192 + 512), &[(0, 512)], &[]).expect_err("in a lost block");
            assert_eq!(
                request(Operation::Read(4096), &[(3, 4096)], &[]).expect("still there"),
                4096
            );
        });
        assert_eq!(image.as_file().metadata().expect("metadata").len(), 8192);
    }
}

/// Writers of different sectors of the same blocks, of whole blocks, and of zeros, on
/// several queues: nobody's last write is lost.
#[test]
fn parts_of_blocks_are_not_lost_to_each_other() {
    const BLOCK: u64 = 4096;
    const QUEUES: u64 = 4;
    for (folder, by_ring) in folders().iter().flat_map(|dir| [(dir, false), (dir, true)]) {
        let (disk, image) = disk(folder, Some(BLOCK as u32));
        let rounds: u64 = if by_ring { 60 } else { 100 };
        std::thread::scope(|scope| {
            for queue in 0..QUEUES {
                let disk = &disk;
                scope.spawn(move || {
                    let guest = memory();
                    let mut uring = Uring::new(disk, None).expect("io_uring");
                    let view = View::new(&guest).expect("view");
                    let mut ring = UringEngine::new(&mut uring, disk, &view, false);
                    let mut sync = SyncEngine::new(disk, &view, false);
                    let mut write = |offset: u64, parts: &[(u64, usize)]| {
                        let operation = Operation::Write(offset);
                        if by_ring {
                            request(&mut ring, &guest, operation, parts, &[]).expect("write");
                        } else {
                            request(&mut sync, &guest, operation, parts, &[]).expect("write");
                        }
                    };
                    for round in 0..rounds {
                        let tag = (round as u8).wrapping_mul(4).wrapping_add(queue as u8);
                        guest.write_slice(&[tag; 8192], GuestAddress(0)).expect("tag");
                        // A sector of its own in each of the first blocks.
                        for block in 0..2 {
                            write(block * BLOCK + queue * 1024, &[(0, 512)]);
                        }
                        // Sectors around the border between two blocks, which others' whole
                        // blocks follow on.
                        write((2 + 2 * queue) * BLOCK - 512, &[(1, 1024)]);
                        write((3 + 2 * queue) * BLOCK, &[(4096, BLOCK as usize)]);
                    }
                });
            }
        });
        let found = content(&image);
        for queue in 0..QUEUES {
            let tag = ((rounds - 1) as u8).wrapping_mul(4).wrapping_add(queue as u8);
            let is = |at: u64, len: u64| {
                let part = &found[at as usize..(at + len) as usize];
                assert!(part.iter().all(|b| *b == tag), "queue {queue} at {at}: {:?}", part[0]);
            };
            for block in 0..2 {
                let at = block * BLOCK + queue * 1024;
                is(at, 512);
                // The others' sectors of block 1 end where queue 0's border write begins.
                if block == 0 || queue < 3 {
                    assert!(found[at as usize + 512..][..512].iter().all(|b| *b == 0x11));
                }
            }
            is((2 + 2 * queue) * BLOCK, 512);
            is((3 + 2 * queue) * BLOCK, BLOCK - 512);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any sectors, with buffers cut and placed anywhere, as if there were no rules.
    #[test]
    fn any_request_does_what_it_says(
        requests in prop::collection::vec(
            (0u8..5, 0..SIZE / 512, 1u64..40, prop::collection::vec((0u64..5000, 1usize..9000), 1..5)),
            1..24,
        ),
        block in prop_oneof![Just(None), Just(Some(512)), Just(Some(4096)), Just(Some(16384))],
        which in any::<bool>(),
    ) {
        let folders = folders();
        let (disk, image) = disk(&folders[usize::from(which) % folders.len()], block);
        // What is claimed must be a rule that the file is content with.
        prop_assume!(block.is_none_or(|block| {
            let real = Direct::of(&disk.file).expect("examined").expect("direct");
            u64::from(block) >= real.block
        }));
        let mut model = content(&image);
        let model = std::cell::RefCell::new(&mut model);
        on_both(&disk, |request, guest| {
            for (n, (kind, sector, sectors, cuts)) in requests.iter().enumerate() {
                let offset = sector * 512;
                let bytes = (sectors * 512).min(SIZE - offset);
                // Parts one behind the other, with a gap of any size in front of each.
                let (mut at, mut left, mut parts) = (0, bytes as usize, Vec::new());
                for (gap, len) in cuts {
                    let len = (*len).min(left);
                    if len > 0 {
                        parts.push((at + gap, len));
                        (at, left) = (at + gap + len as u64, left - len);
                    }
                }
                if left > 0 {
                    parts.push((at, left));
                }
                let range = offset as usize..(offset + bytes) as usize;
                match kind {
                    0 | 1 => {
                        let mut model = model.borrow_mut();
                        let mut place = range.clone();
                        for (at, len) in &parts {
                            let data: Vec<u8> = (0..*len).map(|i| (i * 7 + n * 31) as u8).collect();
                            guest.write_slice(&data, GuestAddress(*at)).expect("data");
                            model[place.start..place.start + len].copy_from_slice(&data);
                            place.start += len;
                        }
                        request(Operation::Write(offset), &parts, &[]).expect("write");
                    }
                    2 | 3 => {
                        assert_eq!(request(Operation::Read(offset), &parts, &[]).expect("read"), bytes);
                        let mut found = Vec::new();
                        for (at, len) in &parts {
                            let mut data = vec![0; *len];
                            guest.read_slice(&mut data, GuestAddress(*at)).expect("data");
                            found.extend(data);
                        }
                        assert!(found == model.borrow()[range], "what is read is there");
                    }
                    _ => {
                        let zero = Range { offset, len: bytes, unmap: n % 2 == 0 };
                        request(Operation::Clear(Clear::Zero), &[], &[zero]).expect("zero");
                        model.borrow_mut()[range].fill(0);
                    }
                }
            }
            request(Operation::Flush, &[], &[]).expect("flush");
        });
        prop_assert!(content(&image) == **model.borrow());
    }
}

/// Pages of memory that were marked before a request was begun may be taken while it is under way.
#[test]
fn what_was_filled_is_marked_when_it_is_over() {
    let file = tempfile::tempfile().expect("file");
    file.set_len(SIZE).expect("size");
    let (read_only, id, direct, overlay) = (false, [7; 20].into(), None, None);
    let disk = Disk { file, size: SIZE, block_size: 512, read_only, id, direct, overlay };
    let guest = memory();
    let (log, _fd) = WriteLog::new(MEMORY).expect("log");
    let view = View::logged(&guest, &log);
    let taken = || {
        let mut pages = 0;
        log.take(|n, bits| pages |= if n == 0 { bits } else { 0 });
        pages
    };
    type Carry<'e> = &'e mut dyn FnMut(Operation, &[(u64, usize)]);
    let check = |engine: Carry<'_>| {
        let parts = &[(0x1000, 512), (0x2fff, 2), (0x5000, 510)];
        engine(Operation::Read(512), parts);
        assert_eq!(taken(), 0b10_1110, "a read");
        engine(Operation::Read(SIZE - 512), &[(0x6000, 1024)]);
        assert_eq!(taken(), 0b100_0000, "one that fails half way");
        engine(Operation::Write(512), parts);
        assert_eq!(taken(), 0, "a write");
        engine(Operation::GetId, &[(0x1000, 20)]);
        assert_eq!(taken(), 0b10, "the serial number");
    };
    let mut sync = SyncEngine::new(&disk, &view, false);
    check(&mut |operation, parts| drop(request(&mut sync, &guest, operation, parts, &[])));
    let mut uring = Uring::new(&disk, None).expect("io_uring");
    let mut engine = UringEngine::new(&mut uring, &disk, &view, false);
    check(&mut |operation, parts| drop(request(&mut engine, &guest, operation, parts, &[])));
}
