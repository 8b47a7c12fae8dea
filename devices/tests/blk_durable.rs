//! What is on stable storage when: after a flush, and after each write where there is no cache.
//! The kernel says how many pages of the image are not written back (cachestat, Linux 6.5).
#![allow(unsafe_code)] // cachestat has no wrapper
#![allow(clippy::expect_used)] // a test fails by panicking

#[allow(dead_code)] // shared; each program uses a part
mod blk_driver;

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blk_driver::*;
use cellblock_devices::protocol::EngineKind;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const F_CONFIG_WCE: u64 = 1 << 11;
const DATA: u64 = 0x20_0000;
/// Not in the libc crate yet.
const SYS_CACHESTAT: libc::c_long = 451;
/// Of the cache mode in the configuration space.
const WRITEBACK: u32 = 32;

/// Pages of the image that are not on stable storage.
fn unwritten(device: &Device) -> u64 {
    /// Of <linux/mman.h>.
    #[repr(C)]
    #[derive(Default)]
    struct Cachestat {
        cached: u64,
        dirty: u64,
        written_back: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let (all, mut found) = ([0u64, 0], Cachestat::default());
    // SAFETY: the kernel reads a range and writes what it found; both live through the call.
    let result = unsafe {
        let file = device.image.as_file().as_raw_fd();
        libc::syscall(SYS_CACHESTAT, file, &raw const all, &raw mut found, 0)
    };
    assert_eq!(result, 0, "cachestat: {}", std::io::Error::last_os_error());
    found.dirty + found.written_back
}

fn start(engine: EngineKind, features: u64) -> (Device, Queue) {
    let dir = Some(PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    let mut device = Device::start(&Options { engine, dir, ..Options::default() }, features);
    let queue = Queue::set_up(&mut device, 0, 16, features);
    (device, queue)
}

fn write(device: &Device, queue: &mut Queue, sector: u64) {
    let memory = device.memory.clone();
    assert_eq!(queue.request(&memory, T_OUT, sector, &[out(DATA, 4096)]), (0, 1));
}

const ENGINES: [EngineKind; 2] = [EngineKind::Sync, EngineKind::IoUring];

#[test]
fn a_flush_writes_back_what_was_written() {
    for engine in ENGINES {
        let (device, mut queue) = start(engine, F_VERSION_1 | F_FLUSH);
        write(&device, &mut queue, 8);
        assert!(unwritten(&device) > 0, "nothing to flush: the test needs a disk file system");
        let memory = device.memory.clone();
        assert_eq!(queue.request(&memory, T_FLUSH, 0, &[]), (0, 1));
        assert_eq!(unwritten(&device), 0, "{engine:?}");
    }
}

#[test]
fn without_a_cache_every_write_is_durable() {
    for engine in ENGINES {
        let (device, mut queue) = start(engine, F_VERSION_1);
        write(&device, &mut queue, 8);
        assert_eq!(unwritten(&device), 0, "{engine:?}: a driver that cannot flush");

        let (mut device, mut queue) = start(engine, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
        write(&device, &mut queue, 8);
        assert!(unwritten(&device) > 0, "{engine:?}: there is a cache at first");
        let flags = VhostUserConfigFlags::WRITABLE;
        device.front.set_config(WRITEBACK, flags, &[0]).expect("cache off");
        // What was in the cache does not stay there, for nobody flushes any more.
        let end = Instant::now() + PATIENCE;
        while unwritten(&device) > 0 {
            assert!(Instant::now() < end, "{engine:?}: it stays in the cache");
            std::thread::sleep(Duration::from_millis(1));
        }
        write(&device, &mut queue, 16);
        assert_eq!(unwritten(&device), 0, "{engine:?}: a driver that turned the cache off");
    }
}
