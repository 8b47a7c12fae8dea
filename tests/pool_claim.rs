//! VMs out of a pool of real shells.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
mod pool_support;

use std::time::{Duration, Instant};

use cellblock::control::protocol::{Limits, Reply, Request, State};
use cellblock::pool::{BaseConfig, ClaimOrder, Machine, PoolConfig, Release, RestorePool, parts};
use pool_support::{Console, LIMIT, Snapshot, base, shape};

fn small() -> PoolConfig {
    PoolConfig {
        min_size: 1,
        max_size: 2,
        max_live: 4,
        acquire_timeout: LIMIT,
        ..PoolConfig::default()
    }
}

fn order(data: &str) -> ClaimOrder<'static> {
    ClaimOrder { data: data.as_bytes().to_vec(), ..ClaimOrder::default() }
}

/// They are made with a lower priority, and wait with that of the pool: all of their processes.
#[test]
fn shells_wait_with_the_priority_of_the_pool() {
    let snapshot = Snapshot::take(",cow");
    let primed = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    // By the refill: nobody waits for it, as one does who warms.
    let pool = RestorePool::new(base(primed), small()).unwrap();
    common::poll(LIMIT, || (pool.idle_count() == 1).then_some(())).expect("a shell");
    let priority = |pid: i32, tid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
        let after = text.rsplit_once(')')?.1;
        after.split_whitespace().nth(16)?.parse::<i32>().ok()
    };
    let vm = pool.claim(&order("anything")).unwrap();
    let family = common::proc::family(vm.pid() as i32);
    assert_eq!(family.len(), 4, "{family:?}");
    let threads = family.iter().flat_map(|one| {
        common::proc::threads(one.pid).into_iter().map(|tid| (one.pid, tid)).collect::<Vec<_>>()
    });
    let own = std::process::id() as i32;
    let wanted = priority(own, own);
    for (pid, tid) in threads {
        assert!([wanted, None].contains(&priority(pid, tid)), "{pid} {tid}");
    }
}

#[test]
fn a_primed_shell_becomes_a_vm_that_knows_who_it_is() {
    let snapshot = Snapshot::take(",cow");
    let pool = RestorePool::new(
        base(Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() }),
        small(),
    )
    .unwrap();
    assert_eq!(pool.warm(2), 2);
    let begun = Instant::now();
    let vm = pool.claim(&order("do this")).unwrap();
    let mut console = Console::of(&vm);
    let who = console.who();
    eprintln!("claim to first line: {:?}", begun.elapsed());
    assert_eq!((who.id.as_str(), who.data.as_str()), (vm.id().to_string().as_str(), "do this"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now.abs_diff(Duration::from_nanos(who.ns)) < Duration::from_secs(20), "its clock");
    console.wait_for("clone: wrote");
    console.say(b"c");
    console.wait_for("clone: own");
    console.say(b"s");
    let serial = console.wait_for("clone: serial=");
    assert!(serial.ends_with(&vm.id().to_string()[..20]), "{serial}");
    let Reply::Stats(stats) = vm.control().unwrap().ask(Request::Stats).unwrap().0 else {
        panic!("no stats")
    };
    assert_eq!(stats.state, State::Running);
    let (control, family) =
        (vm.control_path().to_path_buf(), common::proc::family(vm.pid() as i32));
    assert_eq!(family.len(), 4, "{family:?}");
    assert!(control.exists());
    drop(vm);
    common::proc::wait_gone(&family, LIMIT).expect("nothing of it is left");
    assert!(pool.drain_all(LIMIT));
    assert!(!control.exists());
    let stats = pool.stats();
    assert_eq!((stats.hits, stats.returned, stats.violations, stats.alive), (1, 1, 0, 0));
}

#[test]
fn a_shell_of_a_shape_becomes_whatever_such_a_machine_was() {
    let snapshot = Snapshot::take(",cow");
    let pool = RestorePool::new(base(Machine::Shape(shape(&snapshot))), small()).unwrap();
    assert_eq!(pool.warm(1), 1);
    let begun = Instant::now();
    let vm = pool.restore_snapshot(snapshot.path()).unwrap();
    let mut console = Console::of(&vm);
    let who = console.who();
    eprintln!("claim to first line: {:?}", begun.elapsed());
    assert_eq!(who.id, vm.id().to_string());
    console.wait_for("clone: wrote");
    console.say(b"c");
    console.wait_for("clone: own");
    console.say(b"q");
    console.wait_for("clone: ok");
    assert!(vm.wait_ended(LIMIT), "the guest has ended, and its VM has not");
    drop(vm);
    // By now it is known what memory is needed first, and that is there before the guest runs.
    assert!(snapshot.path().join("touch").exists());
    let again = pool.restore_snapshot(snapshot.path()).unwrap();
    let mut console = Console::of(&again);
    console.wait_for("clone: wrote");
    console.say(b"c");
    console.wait_for("clone: own");
    drop(again);
    assert!(pool.drain_all(LIMIT));
    assert_eq!(pool.stats().violations, 0);
}

#[test]
fn a_vm_comes_from_memory_and_state_too() {
    let snapshot = Snapshot::take(",ro");
    let pool = RestorePool::new(base(Machine::Shape(shape(&snapshot))), small()).unwrap();
    let (memory, state) = parts::read(&snapshot.path()).unwrap();
    let one = pool.restore(&memory, &state).unwrap();
    let other = pool.restore_from_bytes(&parts::pack(&memory, &state)).unwrap();
    let (one_is, other_is) = (Console::of(&one).who(), Console::of(&other).who());
    assert_ne!(one_is.random, other_is.random);
    assert_ne!(one_is.generation, other_is.generation);
    let error = pool.restore(&memory, &state[1..]).unwrap_err();
    assert!(cellblock::remedy::chain(&error).contains("the state"), "{error:?}");
    assert!(pool.restore_from_bytes(b"CBPARTS\nno").is_err());
    drop((one, other));
    assert!(pool.drain_all(LIMIT));
    let stats = pool.stats();
    // What is no state costs no shell.
    assert_eq!((stats.restore_failures, stats.returned, stats.violations), (0, 2, 0));
}

#[test]
fn a_claim_that_does_not_fit_the_pool_is_refused_and_costs_it_nothing() {
    let (one, other) = (Snapshot::take(",cow"), Snapshot::with("mode=clone", ",cow", 96));
    let primed = Machine::Primed { snapshot: one.path(), disks: Vec::new() };
    let primed = RestorePool::new(base(primed), small()).unwrap();
    let line = |error| cellblock::remedy::one_line(&error);
    let text = line(primed.restore_snapshot(other.path()).unwrap_err());
    assert!(text.contains("is not the one that the pool is primed with"), "{text}");
    assert!(line(primed.restore(b"", b"").unwrap_err()).contains("no VMs of anything else"));
    // A copy is the same snapshot wherever it is.
    let copy = one.path().with_file_name("copy");
    let copied = std::process::Command::new("cp").arg("-a").arg(one.path()).arg(&copy).status();
    assert!(copied.unwrap().success());
    drop(primed.restore_snapshot(&copy).unwrap());
    let shapes = RestorePool::new(base(Machine::Shape(shape(&one))), small()).unwrap();
    assert!(line(shapes.claim(&order("")).unwrap_err()).contains("the claim names none"));
    let text = line(shapes.restore_snapshot(other.path()).unwrap_err());
    assert!(text.contains("bytes of memory, and the pool's shells have 67108864"), "{text}");
    let vm = shapes.restore_snapshot(one.path()).unwrap();
    Console::of(&vm).who();
    drop(vm);
    for pool in [primed, shapes] {
        assert!(pool.drain_all(LIMIT));
        let stats = pool.stats();
        assert_eq!((stats.in_use, stats.restore_failures, stats.violations), (0, 0, 0));
    }
}

#[test]
fn a_disk_that_is_as_it_is_wished_for_takes_no_other_shell() {
    let snapshot = Snapshot::take(",cow");
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let config = PoolConfig { min_size: 0, max_live: 1, release: Release::Reset, ..small() };
    let pool = RestorePool::new(base(machine), config).unwrap();
    let claim = |disk: &str| {
        let disks = vec![disk.parse().unwrap()];
        let vm = pool.claim(&ClaimOrder { disks, ..order("touch") }).unwrap();
        assert_eq!(Console::of(&vm).who().id, vm.id().to_string());
        vm.pid()
    };
    let pid = claim("id=disk0,cow");
    assert_eq!(claim("id=disk0,cow"), pid);
    // It gets another image as well, and nobody gets it after that.
    assert_eq!(claim(&format!("id=disk0,cow,path={}", snapshot.disk().display())), pid);
    assert_ne!(claim("id=disk0,cow"), pid);
    assert!(pool.drain_all(LIMIT));
    assert_eq!((pool.stats().reset_failures, pool.stats().violations), (0, 0));
}

#[test]
fn another_disk_is_put_behind_a_shell_that_waits() {
    let snapshot = Snapshot::take("");
    let machine =
        Machine::Primed { snapshot: snapshot.path(), disks: vec!["id=disk0,cow".parse().unwrap()] };
    let config = PoolConfig { min_size: 0, max_size: 4, ..small() };
    let pool = RestorePool::new(base(machine), config).unwrap();
    assert_eq!(pool.warm(4), 4);
    let before = std::fs::read(snapshot.disk()).unwrap();
    let claim = |disk: &str, data: &str| {
        pool.claim(&ClaimOrder { disks: vec![disk.parse().unwrap()], ..order(data) })
    };
    // Its guest reads it, and writes to it.
    let other = snapshot.disk().with_extension("other");
    std::fs::copy(snapshot.disk(), &other).unwrap();
    let vm = claim(&format!("id=disk0,path={}", other.display()), "one").unwrap();
    let mut console = Console::of(&vm);
    console.wait_for("clone: wrote");
    console.say(b"cs");
    console.wait_for("clone: own");
    assert_eq!(console.wait_for("clone: serial="), "clone: serial=disk0");
    let Reply::Stats(stats) = vm.control().unwrap().ask(Request::Stats).unwrap().0 else {
        panic!("no stats")
    };
    assert_eq!(stats.disks[0].restarts, 0, "an exchange is no death");
    drop((console, vm));
    let gone = || common::poll(LIMIT, || (pool.stats().in_use == 0).then_some(()));
    gone().expect("its end, and that of its lock");
    assert!(std::fs::read(&other).unwrap() != before, "it was not written to");
    assert!(std::fs::read(snapshot.disk()).unwrap() == before, "the pool's own was written to");
    // What is in it by now is not what the guest expects, and it says so.
    let vm = claim(&format!("id=disk0,cow,path={}", other.display()), "two").unwrap();
    let mut lines = std::io::BufReader::new(vm.console().unwrap());
    lines.get_mut().set_read_timeout(Some(LIMIT)).unwrap();
    let mut said = String::new();
    while !said.contains("FAIL") {
        let read = std::io::BufRead::read_line(&mut lines, &mut said);
        assert!(matches!(read, Ok(1..)) && !said.contains("clone: wrote"), "{said} {read:?}");
    }
    drop(vm);
    gone().expect("its end");
    // One of another size is no such disk, and a file that is not there none at all.
    std::fs::File::options().write(true).open(&other).unwrap().set_len(1 << 20).unwrap();
    let line = |error| cellblock::remedy::one_line(&error);
    let text = line(claim(&format!("id=disk0,path={}", other.display()), "").unwrap_err());
    assert!(text.contains("has 1048576 bytes, and had 4194304"), "{text}");
    let text = line(claim("id=disk0,path=/nowhere", "").unwrap_err());
    assert!(text.contains("/nowhere"), "{text}");
    // All of them were shells that waited, and what cannot be had has cost none.
    let stats = pool.stats();
    assert_eq!((stats.made, stats.idle, stats.restore_failures), (4, 2, 0));
    assert!(pool.drain_all(LIMIT));
    assert_eq!((pool.stats().violations, pool.stats().alive), (0, 0));
}

/// Another place for what is written is no other image than the pool's.
#[test]
fn a_claim_that_names_no_image_has_the_pools() {
    let (snapshot, kept) = (Snapshot::take(",cow"), tempfile::tempdir().unwrap());
    let image = snapshot.disk().with_extension("pools");
    std::fs::copy(snapshot.disk(), &image).unwrap();
    let disk = format!("id=disk0,path={},cow={}", image.display(), kept.path().display());
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: vec![disk.parse().unwrap()] };
    let pool = RestorePool::new(base(machine), small()).unwrap();
    for disks in [vec![], vec!["id=disk0,cow".parse().unwrap()]] {
        let vm = pool.claim(&ClaimOrder { disks, ..order("") }).unwrap();
        Console::of(&vm).who();
        let cut = vm.control().unwrap().snapshot(false, false, LIMIT, "test", LIMIT).unwrap();
        assert_eq!(cut.report.disks[0].path, image);
    }
    assert!(pool.drain_all(LIMIT));
}

/// What the guest had asked for when the snapshot was taken is carried out when a shell is made: on
/// the disk that the shell has.
#[test]
fn a_disk_that_was_used_before_the_claim_is_not_exchanged() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("s");
    // Most of its requests wait at any time.
    let mut vm = common::Vm::with("mode=storm n=1000000000 quit qd=8 mib=1")
        .disk_with(1 << 20, ",cow,iops=200,iops-burst=200")
        .start();
    vm.wait_for("storm: begins");
    let other = dir.path().join("other");
    std::fs::copy(vm.path("disk0"), &other).unwrap();
    let counters = |vm: &mut common::Vm| vm.stats().disks[0].counters.clone();
    common::poll(LIMIT, || (counters(&mut vm).currently_throttled_gauge > 0).then_some(()))
        .unwrap();
    vm.snapshot(&at, &["--stop"]);
    let machine = Machine::Primed { snapshot: at, disks: Vec::new() };
    let pool = RestorePool::new(base(machine), PoolConfig { min_size: 1, ..small() }).unwrap();
    assert_eq!(pool.warm(1), 1);
    std::thread::sleep(Duration::from_millis(300)); // some of them are carried out
    let disks = vec![format!("id=disk0,cow,path={}", other.display()).parse().unwrap()];
    let refused = pool.claim(&ClaimOrder { disks, ..ClaimOrder::default() }).unwrap_err();
    let text = cellblock::remedy::one_line(&refused);
    assert!(text.contains("had asked for something of disk 'disk0'"), "{text}");
    // As it is, it goes on.
    let vm = pool.claim(&ClaimOrder::default()).unwrap();
    let mut console = Console::of(&vm);
    let mut control = vm.control().unwrap();
    let (bw, bw_burst, iops_burst) = (None, None, None);
    let faster = Request::Throttle { id: "disk0".into(), bw, bw_burst, iops: Some(0), iops_burst };
    control.ask(faster).unwrap();
    console.say(b"q");
    console.wait_for("storm: ok");
    drop((console, control, vm));
    assert!(pool.drain_all(LIMIT));
    assert_eq!(pool.stats().violations, 0);
}

#[test]
fn a_vm_that_is_reset_is_used_again_and_knows_nothing() {
    let snapshot = Snapshot::take(",cow");
    let config = PoolConfig { min_size: 0, max_live: 1, release: Release::Reset, ..small() };
    let pool = RestorePool::new(
        BaseConfig { ..base(Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() }) },
        config,
    )
    .unwrap();
    let mut seen: Vec<(u32, String)> = Vec::new();
    for n in 0..4 {
        let vm = pool.claim(&order(&format!("round {n}"))).unwrap();
        let mut console = Console::of(&vm);
        let who = console.who();
        assert_eq!(who.data, format!("round {n}"));
        assert!(seen.iter().all(|(pid, random)| *pid == vm.pid() && *random != who.random));
        seen.push((vm.pid(), who.random));
        // It checks that memory and disk are as in the snapshot first.
        console.wait_for("clone: wrote");
        let Reply::Stats(stats) = vm.control().unwrap().ask(Request::Stats).unwrap().0 else {
            panic!("no stats")
        };
        assert_eq!(stats.disks[0].throttle, Limits::default(), "what another asked for");
        let (bw, bw_burst, iops_burst) = (None, None, None);
        let limit =
            Request::Throttle { id: "disk0".into(), bw, bw_burst, iops: Some(1), iops_burst };
        let Reply::Throttle { limits, .. } = vm.control().unwrap().ask(limit).unwrap().0 else {
            panic!("no limits")
        };
        assert_eq!(limits.iops, Some(1));
        drop((console, vm));
    }
    assert!(pool.drain_all(LIMIT));
    let stats = pool.stats();
    assert_eq!((stats.made, stats.reset_failures, stats.violations), (1, 0, 0));
    // The last one given back may have been reset before the pool was drained.
    assert!((3..=4).contains(&stats.resets), "{}", stats.resets);
}

/// What one had to say, and who listened, is no business of the next.
#[test]
fn the_console_of_a_vm_that_is_reset_has_nothing_of_the_life_before() {
    let snapshot = Snapshot::take(",cow");
    let config = PoolConfig { min_size: 0, max_live: 1, release: Release::Reset, ..small() };
    let machine = Machine::Primed { snapshot: snapshot.path(), disks: Vec::new() };
    let pool = RestorePool::new(base(machine), config).unwrap();
    let first = pool.claim(&order("secret of the first")).unwrap();
    let pid = first.pid();
    // One never reads what its guest says, and one stays after its VM was given back.
    let unread = || common::poll(LIMIT, || (output(&first) > 100).then_some(()));
    unread().expect("the guest says something");
    drop(first);
    let second = pool.claim(&order("secret of the second")).unwrap();
    assert_eq!(second.pid(), pid, "it was not reset");
    let mut stays = Console::of(&second);
    let who = stays.wait_for("clone: ");
    assert!(who.ends_with("data=secret of the second"), "the first line is another's: {who}");
    stays.wait_for("clone: wrote");
    stays.say(b"mm");
    drop(second);
    let third = pool.claim(&order("third")).unwrap();
    assert_eq!(third.pid(), pid, "it was not reset");
    let mut console = Console::of(&third);
    let who = console.wait_for("clone: ");
    assert!(who.ends_with("data=third"), "the first line is another's: {who}");
    console.wait_for("clone: wrote");
    // Who stayed has been sent away, without a word of the one that came then.
    let rest = stays.rest();
    assert!(!rest.contains("third"), "{rest}");
    console.say(b"c");
    console.wait_for("clone: own");
    drop(third);
    assert!(pool.drain_all(LIMIT));
    assert_eq!((pool.stats().reset_failures, pool.stats().violations), (0, 0));
}

/// Bytes that the guest has written to its console.
fn output(vm: &cellblock::pool::PooledRestoreVm) -> u64 {
    let Reply::Stats(stats) = vm.control().unwrap().ask(Request::Stats).unwrap().0 else {
        panic!("no stats")
    };
    stats.serials[0].output
}

/// Makes a pool in a process of its own, which is killed: there is no other way to be without it.
#[test]
fn what_a_killed_program_left_of_its_pool_is_removed_by_the_next() {
    const CHILD: &str = "POOL_CLAIM_CHILD";
    let name = "what_a_killed_program_left_of_its_pool_is_removed_by_the_next";
    if let Some(snapshot) = std::env::var_os(CHILD) {
        let machine = Machine::Primed { snapshot: snapshot.into(), disks: Vec::new() };
        let pool = RestorePool::new(base(machine), small()).unwrap();
        assert_eq!(pool.warm(1), 1);
        eprintln!("warm");
        std::thread::sleep(LIMIT * 4);
        return;
    }
    use std::io::{BufRead, BufReader};
    let snapshot = Snapshot::take(",cow");
    let parent = tempfile::tempdir().unwrap();
    let start = || {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, snapshot.path())
            .env("TMPDIR", parent.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let warm = lines.map_while(Result::ok).any(|line| line == "warm");
        assert!(warm, "no pool");
        child
    };
    let there = || -> Vec<_> {
        let entries = std::fs::read_dir(parent.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    let mut first = start();
    let left = there();
    assert_eq!(left.len(), 1, "{left:?}");
    let family = common::proc::family(first.id() as i32);
    first.kill().unwrap();
    first.wait().unwrap();
    common::proc::wait_gone(&family, LIMIT).expect("nothing of it is left");
    assert_eq!(there(), left, "it stays, or who removes it?");
    let mut second = start();
    let mut third = start();
    let now = there();
    assert!(now.len() == 2 && !now.contains(&left[0]), "{left:?} {now:?}");
    for child in [&mut second, &mut third] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
