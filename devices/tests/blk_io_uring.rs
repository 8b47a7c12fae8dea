//! The tests of the block device once more, on the io_uring engine.
#![allow(clippy::duplicate_mod)] // each of them brings the driver

#[path = "blk_counters.rs"]
mod counters;
#[path = "blk_throttle.rs"]
mod throttle;
#[path = "blk_vhost_user.rs"]
mod vhost_user;

use cellblock_devices::blk;
use cellblock_devices::protocol::counters::new_counters;
use cellblock_devices::protocol::{BlkStart, EngineKind};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// Prepares a disk on a thread whose io_uring_setup fails with `errno`.
fn prepare_without(errno: i32, engine: EngineKind) -> Result<(), String> {
    let prepare = move || {
        let calls = [(libc::SYS_io_uring_setup, vec![])].into();
        let refuse = SeccompAction::Errno(errno as u32);
        let arch = std::env::consts::ARCH.try_into().expect("architecture");
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, refuse, arch);
        let program: BpfProgram = filter.expect("filter").try_into().expect("program");
        apply_filter(&program).expect("filter applies");
        let image = tempfile::tempfile().expect("image");
        image.set_len(4096).expect("size");
        let start = BlkStart {
            read_only: false,
            size: 4096,
            serial: "x".into(),
            queues: 2,
            poll_us: 0,
            throttle: Default::default(),
            engine: Some(engine),
            failed: false,
            cow: false,
        };
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        let fds = vec![image.into(), new_counters().expect("page")];
        match blk::prepare(start, fds, ours) {
            Ok(_) => Ok(()),
            Err(error) => {
                let mut text = error.to_string();
                let mut source = std::error::Error::source(&error);
                while let Some(error) = source {
                    text += &format!(": {error}");
                    source = error.source();
                }
                Err(text)
            }
        }
    };
    std::thread::spawn(prepare).join().expect("no panic")
}

#[test]
fn a_host_without_io_uring_is_told_of_and_how_to_do_without() {
    for (errno, why) in [(libc::ENOSYS, "os error 38"), (libc::EPERM, "os error 1")] {
        let line = prepare_without(errno, EngineKind::IoUring).expect_err("refused");
        for part in ["no io_uring", "leave engine=io_uring away", "kernel.io_uring_disabled=0", why]
        {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(prepare_without(errno, EngineKind::Sync), Ok(()));
    }
}
