//! The floor: the same requests by a process of the host, without a guest.
#![allow(unsafe_code)] // io_uring takes raw addresses

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use super::cpu;
use super::plan::{Measured, Workload};

/// How the host asks for a block, and what that is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// One system call each.
    Calls,
    /// io_uring, as deep as the guest's queue.
    Ring,
    /// The same with the memory registered, which is then held in place, all of it.
    Registered,
    /// A part: a system call that does nothing.
    Call,
    /// A part: one byte of the block, which is a system call and the search for the page.
    Byte,
    /// A part: the copy alone, out of a mapping of the file.
    Copy,
}

impl Floor {
    /// Those that say something about `work`.
    pub fn of(work: Workload) -> &'static [Floor] {
        match (work.op, work.depth) {
            ("read", 1) => &[
                Floor::Calls,
                Floor::Ring,
                Floor::Registered,
                Floor::Call,
                Floor::Byte,
                Floor::Copy,
            ],
            _ => &[Floor::Calls, Floor::Ring, Floor::Registered],
        }
    }

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Floor::Calls => "host: pread/pwrite",
            Floor::Ring => "host: io_uring",
            Floor::Registered => "host: io_uring, registered",
            Floor::Call => "host: no more than a call",
            Floor::Byte => "host: pread of one byte",
            Floor::Copy => "host: copy from a mapping",
        }
    }

    /// Does `work` for so many cycles.
    pub fn measure(self, work: Workload, disk: &Path, time: u64) -> Measured {
        let file = File::options().read(true).write(true).open(disk).expect("disk");
        let size = file.metadata().expect("disk").len();
        let mut places = Places { work, blocks: size / work.bytes, random: 1, turn: 0 };
        let mut block = vec![0; work.bytes as usize];
        match self {
            Floor::Ring => ring(&file, &mut places, time, false),
            Floor::Registered => ring(&file, &mut places, time, true),
            Floor::Calls if work.is_write() => {
                repeat(&mut places, time, |at| file.write_all_at(&block, at).expect("write"))
            }
            Floor::Calls => {
                repeat(&mut places, time, |at| file.read_exact_at(&mut block, at).expect("read"))
            }
            Floor::Call => repeat(&mut places, time, |_| {
                std::hint::black_box(nix::unistd::getppid());
            }),
            Floor::Byte => repeat(&mut places, time, |at| {
                file.read_exact_at(&mut block[..1], at).expect("read");
            }),
            Floor::Copy => {
                let mapping = map(&file, size);
                repeat(&mut places, time, |at| {
                    let from = mapping.get_slice(at as usize, block.len()).expect("in the file");
                    std::hint::black_box(from.copy_to(&mut block));
                })
            }
        }
    }
}

/// All of the file, with its pages there.
fn map(file: &File, size: u64) -> MmapRegion {
    let file = FileOffset::new(file.try_clone().expect("copy of the file"), 0);
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    MmapRegion::build(Some(file), size as usize, libc::PROT_READ, flags).expect("mapping")
}

struct Places {
    work: Workload,
    blocks: u64,
    random: u64,
    turn: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        self.turn += 1;
        let block = if self.work.is_sequential() {
            self.turn % self.blocks
        } else {
            self.random =
                self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.random >> 33) % self.blocks
        };
        block * self.work.bytes
    }
}

fn repeat(places: &mut Places, time: u64, mut one: impl FnMut(u64)) -> Measured {
    let mut latencies = Vec::with_capacity(1 << 20);
    let (cpu, start) = (cpu::of_this_thread(), cpu::cycles());
    let mut now = start;
    while now - start < time {
        one(places.next());
        let end = cpu::cycles();
        latencies.push(end - now);
        now = end;
    }
    Measured::new(latencies, now - start, cpu::of_this_thread() - cpu)
}

fn ring(file: &File, places: &mut Places, time: u64, registered: bool) -> Measured {
    let (depth, bytes) = (places.work.depth as usize, places.work.bytes as usize);
    let mut memory = vec![0u8; bytes * depth];
    let mut ring = IoUring::new(128).expect("io_uring");
    ring.submitter().register_files(&[file.as_raw_fd()]).expect("file");
    if registered {
        let all = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
        // SAFETY: the memory outlives the ring, which is dropped first.
        unsafe { ring.submitter().register_buffers(&[all]) }.expect("memory");
    }
    let mut started = vec![0; depth];
    let mut latencies = Vec::with_capacity(1 << 20);
    let mut idle: Vec<usize> = (0..depth).collect();
    let (cpu, start) = (cpu::of_this_process(), cpu::cycles());
    let mut now = start;
    while now - start < time || idle.len() < depth {
        while now - start < time
            && let Some(slot) = idle.pop()
        {
            let (at, block) = (places.next(), memory[slot * bytes..].as_mut_ptr());
            let (file, len) = (Fixed(0), bytes as u32);
            let entry = match (places.work.is_write(), registered) {
                (true, false) => opcode::Write::new(file, block, len).offset(at).build(),
                (true, true) => opcode::WriteFixed::new(file, block, len, 0).offset(at).build(),
                (false, false) => opcode::Read::new(file, block, len).offset(at).build(),
                (false, true) => opcode::ReadFixed::new(file, block, len, 0).offset(at).build(),
            };
            // SAFETY: the block is neither touched nor freed before its request is over.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.expect("room");
            started[slot] = cpu::cycles();
        }
        ring.submit_and_wait(1).expect("submit");
        now = cpu::cycles();
        for done in ring.completion() {
            assert_eq!(done.result(), bytes as i32, "a whole block");
            let slot = done.user_data() as usize;
            latencies.push(now - started[slot]);
            idle.push(slot);
        }
    }
    Measured::new(latencies, now - start, cpu::of_this_process() - cpu)
}
