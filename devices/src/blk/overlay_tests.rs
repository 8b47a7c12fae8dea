#![allow(unsafe_code)] // a test forks a process to kill it
use super::*;
use proptest::prelude::*;
use std::io::{Read, Write};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::memory::Memory;
use super::super::request::Operation;
use crate::protocol::overlay::{Extent, overlay_bytes};
use cellblock_wire::{Access, sealed_memfd};

const KIB: u64 = 1024;
/// Two chunks and a bit, and a last block of three sectors.
const SIZE: u64 = 2 * CHUNK + 5 * BLOCK + 3 * 512;

/// An image whose every sector differs, with a process's way of looking at it and the
/// content a guest should see.
struct Rig {
    disk: Disk,
    map: Bitmap,
    image: Vec<u8>,
    content: Vec<u8>,
    memory: Memory,
}

fn overlay(file: &File, map: &std::os::fd::OwnedFd) -> Overlay {
    let map = Bitmap::map(map, SIZE, Access::ReadWrite).expect("map");
    Overlay::new(file.try_clone().expect("duplicate"), map, SIZE)
}

impl Rig {
    fn new() -> Rig {
        let image: Vec<u8> = (0..SIZE).map(|at| (at / 512 * 7 + 1) as u8).collect();
        let file = tempfile::NamedTempFile::new().expect("image");
        file.as_file().write_all_at(&image, 0).expect("fill");
        // As it is given: nothing can write the image through it.
        let file = File::open(file.path()).expect("open");
        let layer = File::from(sealed_memfd("cow", overlay_bytes(SIZE)).expect("overlay"));
        let map = Bitmap::create(SIZE).expect("map");
        let disk = Disk {
            file,
            size: SIZE,
            block_size: 4096,
            read_only: false,
            id: Default::default(),
            direct: None,
            overlay: Some(overlay(&layer, &map)),
        };
        let map = Bitmap::map(&map, SIZE, Access::ReadOnly).expect("map");
        let memory = Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory");
        Rig { disk, map, content: image.clone(), image, memory }
    }

    fn run(&self, operation: Operation, data: &[Slice<'_>], ranges: &[Range]) {
        let mut filled = 0;
        Executor::new(true)
            .execute(&self.disk, operation, data, ranges, &mut filled)
            .unwrap_or_else(|error| panic!("{operation:?}: {error}"));
        if let Operation::Read(_) = operation {
            assert_eq!(filled, total(data));
        }
    }

    /// `parts` pieces of guest memory, which do not end where sectors do.
    fn slices(&self, len: u64, parts: u64) -> Vec<Slice<'_>> {
        let each = len / parts;
        let slice = |n: u64| {
            let len = if n + 1 == parts { len - each * n } else { each };
            let at = GuestAddress(n * (each + 24) + 8);
            GuestMemoryBackend::get_slice(&self.memory, at, len as usize).expect("slice")
        };
        (0..parts).map(slice).collect()
    }

    fn write(&mut self, offset: u64, len: u64, parts: u64, value: u8) {
        let data = self.slices(len, parts);
        data.iter().for_each(|slice| slice.copy_from(&vec![value; slice.len()]));
        self.run(Operation::Write(offset), &data, &[]);
        self.content[offset as usize..][..len as usize].fill(value);
    }

    fn zero(&mut self, offset: u64, len: u64) {
        self.run(Operation::Clear(Clear::Zero), &[], &[Range { offset, len, unmap: false }]);
        self.content[offset as usize..][..len as usize].fill(0);
    }

    fn read(&self, offset: u64, len: u64, parts: u64) -> Vec<u8> {
        let data = self.slices(len, parts);
        self.run(Operation::Read(offset), &data, &[]);
        let mut all = Vec::new();
        for slice in &data {
            let mut bytes = vec![0; slice.len()];
            slice.copy_to(&mut bytes);
            all.extend(bytes);
        }
        all
    }

    #[track_caller]
    fn check(&self) {
        let found = self.read(0, SIZE, 5);
        let differs = found.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(differs, None, "first byte that is wrong");
        let mut image = vec![0; SIZE as usize];
        self.disk.file.read_exact_at(&mut image, 0).expect("read");
        assert!(image == self.image, "the image was written");
    }

    fn extents(&self) -> Vec<(u64, u64)> {
        self.map.extents().map(|Extent { offset, len }| (offset, len)).collect()
    }
}

#[test]
fn writes_go_to_the_overlay_and_are_read_across_both() {
    let mut rig = Rig::new();
    rig.check();
    assert_eq!(rig.extents(), []);
    rig.write(0, 512, 1, 0xa1); // part of a block
    rig.check();
    rig.write(BLOCK, BLOCK, 1, 0xa2); // one
    rig.write(CHUNK - 2 * BLOCK + 512, 4 * BLOCK, 7, 0xa3); // over the end of a chunk
    rig.check();
    rig.write(SIZE - 512, 512, 1, 0xa4); // part of the short one
    rig.check();
    rig.write(SIZE - 1536, 1536, 2, 0xa5); // all of it
    rig.write(512, 512, 1, 0xa6); // again, where no copy is made
    rig.check();
    let last = SIZE / BLOCK * BLOCK;
    assert_eq!(rig.extents(), [(0, 2 * BLOCK), (CHUNK - 2 * BLOCK, 5 * BLOCK), (last, BLOCK)]);
    rig.run(Operation::Flush, &[], &[]);
}

#[test]
fn zeroed_parts_of_blocks_keep_the_rest() {
    for (offset, len) in [
        (512, 512),
        (0, BLOCK),
        (BLOCK - 512, 1024),
        (512, CHUNK + 2 * BLOCK),
        (SIZE - 512, 512),
        (SIZE - 1536, 1536),
        (SIZE - BLOCK, BLOCK),
        (0, SIZE),
    ] {
        let mut rig = Rig::new();
        rig.zero(offset, len);
        rig.check();
        // Over what was written.
        rig.write(offset / BLOCK * BLOCK, 3 * 512, 1, 0xee);
        rig.check();
        rig.zero(offset, len);
        rig.check();
    }
}

#[test]
fn a_discard_gives_memory_back_and_leaves_the_rest_of_its_blocks() {
    use std::os::unix::fs::MetadataExt;
    let mut rig = Rig::new();
    rig.write(0, CHUNK, 1, 0x77);
    let space = |rig: &Rig| {
        let overlay = rig.disk.overlay.as_ref().expect("overlay");
        overlay.file.metadata().expect("metadata").blocks() * 512
    };
    let before = space(&rig);
    let range = Range { offset: 512, len: CHUNK, unmap: false };
    rig.run(Operation::Clear(Clear::Discard), &[], &[range]);
    assert_eq!(space(&rig), before - (CHUNK - BLOCK));
    rig.content[BLOCK as usize..CHUNK as usize].fill(0);
    rig.check();
}

/// What a write that failed, or a process that was killed, left in the overlay is not seen.
#[test]
fn what_lies_under_an_unset_bit_is_never_read() {
    let mut rig = Rig::new();
    let overlay = rig.disk.overlay.as_ref().expect("overlay");
    overlay.file.write_all_at(&vec![0xdd; SIZE as usize], 0).expect("garbage");
    rig.check();
    rig.write(3 * BLOCK + 512, 512, 1, 1);
    rig.zero(7 * BLOCK, BLOCK);
    rig.zero(9 * BLOCK + 512, 512);
    rig.zero(CHUNK - 1024, 2 * BLOCK);
    rig.write(SIZE - 1024, 512, 1, 2);
    rig.check();
}

/// Everything is as it was for the next process, which has but the file and the map.
#[test]
fn another_process_goes_on() {
    let mut rig = Rig::new();
    rig.write(BLOCK + 512, 3 * BLOCK, 2, 5);
    let old = rig.disk.overlay.take().expect("overlay");
    let file = old.file.try_clone().expect("duplicate");
    rig.disk.overlay = Some(Overlay::new(file, old.bitmap, SIZE));
    rig.check();
    rig.write(BLOCK, 512, 1, 6);
    rig.check();
}

#[test]
fn a_shrunken_image_fails_requests_that_need_it_and_no_others() {
    let rig = Rig::new();
    let short = tempfile::NamedTempFile::new().expect("image");
    short.as_file().set_len(BLOCK).expect("size");
    let file = File::open(short.path()).expect("open");
    let rig = Rig { disk: Disk { file, ..rig.disk }, ..rig };
    let data = rig.slices(512, 1);
    let mut engine = Executor::new(false);
    let mut run = |at| engine.execute(&rig.disk, Operation::Write(at), &data, &[], &mut 0);
    run(0).expect("there");
    let error = run(BLOCK).expect_err("no block to copy");
    assert!(matches!(error, ExecuteError::EndOfFile(BLOCK)), "{error}");
    assert_eq!(rig.extents(), [(0, BLOCK)]);
    let whole = rig.slices(BLOCK, 1);
    engine.execute(&rig.disk, Operation::Write(BLOCK), &whole, &[], &mut 0).expect("whole block");
}

/// Queues write neighbouring sectors at the same time: none undoes another's.
#[test]
fn queues_that_share_blocks_lose_nothing() {
    for round in 0..40 {
        let mut rig = Rig::new();
        let blocks = 64;
        std::thread::scope(|scope| {
            for queue in 0..4u64 {
                let rig = &rig;
                scope.spawn(move || {
                    let mut engine = Executor::new(false);
                    let at = GuestAddress((1 << 20) + queue * 64 * KIB);
                    let data = GuestMemoryBackend::get_slice(&rig.memory, at, 1024).expect("slice");
                    data.copy_from(&[0x40 + queue as u8; 1024]);
                    for block in 0..blocks {
                        let at = block * BLOCK + queue * 1024;
                        let write = Operation::Write(at);
                        engine.execute(&rig.disk, write, &[data], &[], &mut 0).expect("write");
                    }
                });
            }
        });
        for block in 0..blocks {
            for queue in 0..4 {
                let at = (block * BLOCK + queue * 1024) as usize;
                rig.content[at..at + 1024].fill(0x40 + queue as u8);
            }
        }
        let found = rig.read(0, SIZE, 1);
        assert!(found == rig.content, "a write was undone in round {round}");
    }
}

/// A device process is killed between any two of its steps: a block is the old or the new.
#[test]
fn a_killed_process_leaves_old_or_new_blocks() {
    use nix::sys::wait::waitpid;
    use nix::unistd::{ForkResult, fork};
    let mut seen = [0; 2];
    for round in 0..100u64 {
        let mut rig = Rig::new();
        let overlay = rig.disk.overlay.as_ref().expect("overlay");
        overlay.file.write_all_at(&vec![0xdd; SIZE as usize], 0).expect("garbage");
        let data = rig.slices(SIZE - 1024, 3);
        data.iter().for_each(|slice| slice.copy_from(&vec![0x99u8; slice.len()]));
        // However busy the machine, some are killed half-way: they wait for it there.
        let waits = round % 4 == 0;
        let (mut half_way, mut tell) = std::io::pipe().expect("pipe");
        // SAFETY: the child makes system calls on what is there already, and is killed.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                let mut iovecs = Executor::new(false);
                // Whole blocks and parts of others.
                for sector in (1..SIZE / 512 - 1).step_by(19) {
                    if waits && sector > SIZE / 1024 {
                        let _ = tell.write_all(&[1]);
                        nix::unistd::pause();
                    }
                    let count = 19.min(SIZE / 512 - 1 - sector);
                    let part = part(&data, (sector - 1) * 512, count * 512).unwrap_or_default();
                    let write = Operation::Write(sector * 512);
                    let _ = iovecs.execute(&rig.disk, write, &part, &[], &mut 0);
                }
                // SAFETY: ends this process and touches nothing.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                if waits {
                    half_way.read_exact(&mut [0]).expect("half-way");
                } else {
                    std::thread::sleep(std::time::Duration::from_micros(5 * round));
                }
                let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
                waitpid(child, None).expect("wait");
            }
        }
        // The successor sees sectors in the order they were written, old ones behind.
        let found = rig.read(0, SIZE, 1);
        let new = (1..SIZE / 512 - 1)
            .take_while(|sector| found[*sector as usize * 512] == 0x99)
            .count() as u64;
        rig.content[512..512 + new as usize * 512].fill(0x99);
        let wrong = found.iter().zip(&rig.content).position(|(a, b)| a != b);
        let wrong = wrong.map(|at| (at, found[at], rig.content[at]));
        assert_eq!(wrong, None, "round {round}, {new} sectors: neither old nor new");
        seen[usize::from(new > 0 && new < SIZE / 512 - 2)] += 1;
        // And what is done again is done.
        rig.write(512, SIZE - 1024, 3, 0x99);
        rig.check();
    }
    assert!(seen[1] > 0, "no process was killed in the middle: {seen:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, count: u64, parts: u64, value: u8 },
    Zero { sector: u64, count: u64 },
    Read { sector: u64, count: u64, parts: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = SIZE / 512;
    let range = (0..sectors, prop_oneof![1..20u64, 1..sectors])
        .prop_map(move |(sector, count)| (sector, count.min(sectors - sector)));
    (range, 1..5u64, any::<u8>(), 0..4u8).prop_map(|((sector, count), parts, value, kind)| {
        match kind {
            0 => Step::Zero { sector, count },
            1 => Step::Read { sector, count, parts },
            _ => Step::Write { sector, count, parts, value },
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    /// The disk is what a plain one would be, whatever is done to it.
    #[test]
    fn it_is_a_disk(steps in prop::collection::vec(step(), 1..20)) {
        let mut rig = Rig::new();
        for step in steps {
            match step {
                Step::Write { sector, count, parts, value } => {
                    rig.write(sector * 512, count * 512, parts, value);
                }
                Step::Zero { sector, count } => rig.zero(sector * 512, count * 512),
                Step::Read { sector, count, parts } => {
                    let found = rig.read(sector * 512, count * 512, parts);
                    let wanted = &rig.content[sector as usize * 512..][..count as usize * 512];
                    prop_assert!(found == wanted);
                }
            }
        }
        rig.check();
    }
}
