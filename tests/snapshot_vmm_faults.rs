//! A snapshot for which the VMM cannot get what it needs, at each step: there is none, the VM is
//! as it was, and what its guest had written is in the next one. For root.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use cellblock::control::protocol::State;
use cellblock::snapshot::format::{CHUNK, Chain};
use common::Vm;
use common::trace::{Call, Traced};
use nix::errno::Errno;
use nix::libc;

/// Steps of a kind after which its others are taken as read.
const ALIKE: usize = 2;

/// The calls by which the VMM gets room for a cut and fills it.
fn is_step(call: Call) -> bool {
    let calls =
        [libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_sendfile, libc::SYS_pwrite64];
    call.entered && calls.contains(&call.number)
}

fn begin(vm: &Vm, to: &Path, options: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    command.arg("snapshot").arg(vm.path("control")).arg(to).args(options);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A snapshot of which the VMM's step number `at` fails; what was said, `None` where there is no
/// such step.
fn failing(vm: &Vm, to: &Path, options: &[&str], at: usize, errno: Errno) -> Option<String> {
    let vmm = Traced::hold(vm.pid(), "cellblock");
    let mut command = begin(vm, to, options);
    let (mut steps, mut copies) = (0, 0);
    let wanted = |call: Call| {
        copies += usize::from(call.entered && call.number == libc::SYS_sendfile);
        if !is_step(call) || call.number == libc::SYS_sendfile && copies > ALIKE {
            return false;
        }
        steps += 1;
        steps == at + 1
    };
    let met = vmm.run_until_or(wanted, || command.try_wait().unwrap().is_some()).is_some();
    if met {
        vmm.fail(errno);
    }
    vmm.release();
    let ended = command.wait_with_output().unwrap();
    let line = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.success(), !met, "step {at}: {line}");
    met.then_some(line)
}

fn contents(at: &Path) -> Vec<u8> {
    let chain = Chain::open(at).unwrap();
    let mut all = vec![0; chain.chunks() * CHUNK];
    for (index, chunk) in all.chunks_mut(CHUNK).enumerate() {
        chain.read_chunk(index, chunk).unwrap();
    }
    all
}

fn fails_at_every_step(options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str, n: usize| dir.path().join(format!("{name}{n}"));
    let mut vm = Vm::with("mode=pause every=20").memory("32M").disk(2).start();
    vm.wait_for_line("pause: n=40 ");
    vm.snapshot(&at("full", 0), &[]);
    let mut step = 0;
    loop {
        vm.wait_for_line("pause: n=");
        vm.pause();
        let errno = [Errno::EMFILE, Errno::ENOSPC][step % 2];
        let Some(said) = failing(&vm, &at("none", step), options, step, errno) else { break };
        assert!(!at("none", step).exists() && said.lines().count() == 1, "step {step}: {said}");
        assert!(said.contains(errno.desc()), "step {step}: {said}");
        assert_eq!(vm.stats().state, State::Paused, "step {step}: {said}");
        // Nothing runs meanwhile: both are of the same moment.
        let parent = at("full", step);
        vm.snapshot(&at("diff", step), &["--diff", parent.to_str().unwrap()]);
        vm.snapshot(&at("full", step + 1), &[]);
        let (diff, full) = (contents(&at("diff", step)), contents(&at("full", step + 1)));
        let differ = diff.chunks(4096).zip(full.chunks(4096)).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "pages the diff lacks after step {step} failed: {said}");
        vm.resume();
        step += 1;
    }
    assert!(step > 6, "there were {step} steps only");
    vm.resume();
    vm.wait_for_line("pause: n=");
    vm.say(b"q");
    vm.wait_for("pause: ok");
    vm.ends_well();
}

#[test]
fn a_cut_that_fails_at_any_step_loses_nothing() {
    fails_at_every_step(&[]);
}

#[test]
fn a_live_cut_that_fails_at_any_step_loses_nothing() {
    fails_at_every_step(&["--live"]);
}
