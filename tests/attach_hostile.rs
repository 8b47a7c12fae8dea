//! Programs that attach and mean harm: neither the VM nor the others who attach suffer from what
//! they send, hold, or leave undone.
#![allow(clippy::unwrap_used)] // a failure here is a failed test

mod attach_support;
mod common;

use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use attach_support::{attach, kernel};
use cellblock::control::protocol::Request as Control;
use cellblock_plugin_api::slot::{SLOT, at};
use cellblock_plugin_api::wire::part::{FromPart, ToPart};
use cellblock_plugin_api::wire::{Answer, Payload, Reply, Request, VERSION};
use cellblock_plugin_api::{Event, Space};
use cellblock_wire::{Access, Channel, ChannelError, Mapping};
use common::Vm;
use kvm_bindings::kvm_pic_state;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg,
    setsockopt, socket, sockopt::Linger,
};

/// So long nothing takes that waits for nobody, however busy the machine is; what would be waited for
/// takes ten minutes, or for ever.
const SOON: Duration = Duration::from_secs(20);
/// `mov dx, 0x510`; 4: `inc al`; `out dx, al`; `jmp 4`.
const SAYING: &[u8] = &[0x66, 0xba, 0x10, 0x05, 0xfe, 0xc0, 0xee, 0xeb, 0xfb];
const PORT: u64 = 0x510;

fn saying(options: &str, prefix: &[&str]) -> (Vm, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::with("")
        .kernel(&kernel(dir.path(), SAYING))
        .prefix(prefix)
        .arg("--plugin-socket")
        .arg(format!("plugin{options}"))
        .start();
    (vm, dir)
}

fn raw(path: &Path) -> nix::Result<Channel> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(Channel::from_fd(fd))
}

const HELLO: Request = Request::Hello { version: VERSION };

fn ask(channel: &Channel, request: &Request, fds: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
    channel.send(request, fds).unwrap();
    channel.recv_timeout(common::LIMIT).unwrap()
}

/// A socket whose last reference takes ten minutes to close, as long as the other one is there.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    setsockopt(&socket.as_fd(), Linger, &libc::linger { l_onoff: 1, l_linger: 600 }).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    (socket.into(), peer)
}

/// Closes it, and waits for it if nobody else has it.
fn let_go(slow: OwnedFd) {
    std::thread::spawn(move || drop(slow));
}

#[track_caller]
fn stops_soon(mut vm: Vm) {
    let begin = Instant::now();
    vm.ask(Control::Stop);
    vm.ends_well();
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
}

#[test]
fn what_takes_long_to_close_holds_up_nobody() {
    let (vm, _dir) = saying("", &[]);
    drop(attach(&vm));
    let path = vm.path("plugin");
    // With a message that takes no fds: its connection ends.
    let (slow, _peer) = lingering();
    let greeted = raw(&path).unwrap();
    greeted.send(&HELLO, &[slow.as_fd()]).unwrap();
    let_go(slow);
    assert!(greeted.recv_timeout::<Reply>(SOON).is_err());
    // Where memory is asked for.
    let (slow, _second) = lingering();
    let makes = raw(&path).unwrap();
    ask(&makes, &HELLO, &[]).0.unwrap();
    let (offset, length, start) = (0, 4096, 1 << 40);
    let memory =
        Request::CreateMemory { offset, length, start, read_only: false, dirty_log: false };
    makes.send(&memory, &[slow.as_fd()]).unwrap();
    let_go(slow);
    assert_eq!(makes.recv_timeout::<Reply>(SOON).unwrap().0.unwrap_err(), libc::EINVAL);
    // In a connection that ends before it is read.
    let (slow, _third) = lingering();
    let leaves = raw(&path).unwrap();
    let mut answers = 0;
    while leaves.try_send(&Request::MsrIndexList, &[]).is_ok_and(|sent| sent) && answers < 2000 {
        answers += 1;
    }
    let _ = leaves.send(&HELLO, &[slow.as_fd()]);
    let_go(slow);
    drop(leaves);
    // Others are served, and the VM ends.
    let begin = Instant::now();
    drop(attach(&vm));
    assert_eq!(ask(&makes, &memory, &[]).0.unwrap_err(), libc::EBADF);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    stops_soon(vm);
}

/// Another user's part of a test, and where.
const AS_USER: &str = "CELLBLOCK_HOSTILE_AS";

/// Runs `part` of this program as `uid`.
fn as_user(vm: &Vm, uid: u32, part: &str) -> std::process::Child {
    let program = vm.path("test");
    let own = std::env::current_exe().unwrap();
    assert!(Command::new("cp").arg(own).arg(&program).status().unwrap().success());
    Command::new("setpriv")
        .args([&format!("--reuid={uid}"), "--regid=65530", "--clear-groups", "--"])
        .arg(&program)
        .args(["--exact", "as_another_user", "--nocapture"])
        .env(AS_USER, format!("{part} {}", vm.path("plugin").display()))
        .current_dir("/")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn as_another_user() {
    let Ok(words) = std::env::var(AS_USER) else { return };
    let (part, path) = words.split_once(' ').unwrap();
    let path = Path::new(path);
    match part {
        "connect" => (0..10_000).for_each(|_| drop(raw(path).unwrap())),
        "flood" => {
            let held = flood(path);
            println!("flooded with {}", held.len());
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        "storm" => {
            storm(path);
            println!("storm over");
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        other => panic!("{other}"),
    }
}

/// Makes as many connections as it can.
fn flood(path: &Path) -> Vec<Channel> {
    let mut held = Vec::new();
    for _ in 0..20 {
        let Ok(first) = raw(path) else { break };
        if first.send(&HELLO, &[]).is_err() || first.recv_timeout::<Reply>(SOON).is_err() {
            continue;
        }
        while let (Ok(Answer::Done), fds) = ask(&first, &Request::NewConnection, &[]) {
            held.extend(fds.into_iter().map(Channel::from_fd));
        }
        held.push(first);
    }
    held
}

/// Fewer files than VMs have as a rule.
const FEW: [&str; 3] = ["sh", "-c", "ulimit -n 1024; exec \"$0\" \"$@\""];

#[test]
fn who_holds_all_it_may_leaves_the_vmm_enough() {
    let (mut vm, _dir) = saying(",observe=65533", &FEW);
    drop(attach(&vm));
    let open = |vm: &Vm| std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count();
    let mut observer = common::is_root("becoming another user").then(|| {
        let mut observer = as_user(&vm, 65533, "flood");
        let mut out = std::io::BufReader::new(observer.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("flooded with") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0, "it has ended");
        }
        println!("{line} with {} open", open(&vm));
        // Who controls gets in all the same.
        drop(attach(&vm));
        observer
    });
    let events = attach(&vm);
    let mut held = Vec::new();
    let full = loop {
        match events.create_irq_event(20) {
            Ok(event) => held.push(event),
            Err(error) => break error.errno(),
        }
    };
    assert_eq!(full, libc::EMFILE);
    let connections = flood(&vm.path("plugin"));
    println!("{} events, {} connections, {} open", held.len(), connections.len(), open(&vm));
    assert!(open(&vm) < 1024 - 400, "{}", open(&vm));
    vm.pause();
    vm.resume();
    if let Some(observer) = &mut observer {
        observer.kill().unwrap();
        observer.wait().unwrap();
    }
    stops_soon(vm);
}

#[test]
fn watches_and_ranges_have_an_end_and_a_pause_is_quick_among_them() {
    let (mut vm, _dir) = saying("", &[]);
    let first = attach(&vm);
    let watches = |vm: &cellblock_plugin_api::Vm| {
        (0..).find_map(|n| vm.watch_range(Space::Port, PORT - n, n + 1).err())
    };
    let over = AtomicBool::new(false);
    let others: Vec<_> = (0..8).map(|_| attach(&vm)).collect();
    for other in &others {
        assert_eq!(watches(other).unwrap().errno(), libc::ENOSPC);
        assert_eq!(other.watch_range(Space::Port, PORT, 2).unwrap_err().errno(), libc::EEXIST);
    }
    let mut reserved = (0..).map(|n| first.reserve_range(Space::Mmio, (1 << 40) + 2 * n, 1));
    assert_eq!(reserved.find_map(Result::err).unwrap().errno(), libc::ENOSPC);
    std::thread::scope(|scope| {
        for other in &others {
            let (vcpu, over) = (other.vcpu(0).unwrap(), &over);
            scope.spawn(move || {
                let mut before: Option<u8> = None;
                while !over.load(Ordering::Relaxed) {
                    match vcpu.wait_timeout(Duration::from_millis(50)) {
                        Ok(Some(Event::Watched(access))) => {
                            // Once each, however many of its watches hold it.
                            let now = access.data[0];
                            assert!(before.is_none_or(|b| b.wrapping_add(1) == now), "{now}");
                            before = Some(now);
                        }
                        Ok(None) => continue,
                        Ok(other) => panic!("{other:?}"),
                        Err(_) => break,
                    }
                    vcpu.resume().unwrap();
                }
            });
        }
        for _ in 0..10 {
            let begin = Instant::now();
            vm.pause();
            assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
            vm.resume();
        }
        over.store(true, Ordering::Relaxed);
    });
    stops_soon(vm);
}

/// What is written into the shared memory without rule or reason holds up neither a pause nor the
/// end.
#[test]
fn words_at_random_hold_nothing_up() {
    let (mut vm, _dir) = saying("", &[]);
    drop(attach(&vm));
    let programs: Vec<_> = (0..3)
        .map(|_| {
            let channel = raw(&vm.path("plugin")).unwrap();
            let (answer, fds) = ask(&channel, &HELLO, &[]);
            assert!(matches!(answer, Ok(Answer::Hello { vcpus: 1, .. })));
            let slots = Mapping::new(&fds[0], SLOT, Access::ReadWrite).unwrap();
            let watch = Request::WatchRange { space: Space::Port, start: PORT, length: 1 };
            ask(&channel, &watch, &[]).0.unwrap();
            (channel, slots)
        })
        .collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (n, (channel, slots)) in programs.iter().enumerate() {
            let over = &over;
            scope.spawn(move || {
                let word = |at| slots.u32(at);
                let mut value = n as u32;
                while !over.load(Ordering::Relaxed) {
                    value = value.wrapping_mul(0x9e37_79b1).wrapping_add(1);
                    // The resume is right, the rest is not.
                    word(at::RESUME_SEQ)
                        .store(word(at::EVENT_SEQ).load(Ordering::Relaxed), Ordering::Relaxed);
                    word(at::ORDER).store(value >> 27, Ordering::Relaxed);
                    word(at::ORDER_LEN).store(value, Ordering::Relaxed);
                    word(at::SETS).store(value >> 20 & 7, Ordering::Relaxed);
                    word(at::ORDER_SEQ).store(value, Ordering::Relaxed);
                    word(at::ASYNC_HEAD).store(value, Ordering::Relaxed);
                    if value.is_multiple_of(64) {
                        let pause = Request::PauseVcpus { mask: vec![1], user: 1 };
                        let _ = channel.try_send(&pause, &[]);
                        while let Ok(Some(_)) = channel.try_recv::<Reply>() {}
                    }
                }
            });
        }
        for _ in 0..10 {
            let begin = Instant::now();
            vm.pause();
            assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
            vm.resume();
            std::thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
    });
    drop(programs);
    stops_soon(vm);
}

#[test]
fn who_is_refused_does_not_fill_the_log() {
    if !common::is_root("becoming another user") {
        return;
    }
    let (mut vm, _dir) = saying(",observe=65533", &[]);
    drop(attach(&vm));
    let begin = Instant::now();
    assert!(as_user(&vm, 65531, "connect").wait().unwrap().success());
    drop(attach(&vm));
    vm.wait_for_error("refused a program");
    // A burst, and then ten a second.
    let allowed = 60 + begin.elapsed().as_secs() as usize * 11;
    let lines = vm.stderr.text().matches("refused a program").count();
    assert!((2..allowed.min(1000)).contains(&lines), "{lines} lines");
    stops_soon(vm);
}

#[test]
fn a_line_goes_down_with_the_last_who_holds_it_up() {
    let (vm, _dir) = saying("", &[]);
    let looks = attach(&vm);
    let up = || -> bool {
        let pic: kvm_pic_state = looks.pic_state(false).unwrap();
        pic.last_irr & 4 != 0
    };
    let (one, two) = (attach(&vm), attach(&vm));
    one.set_irq(10, true).unwrap();
    two.set_irq(10, true).unwrap();
    assert!(up());
    drop(one);
    std::thread::sleep(Duration::from_millis(50));
    assert!(up(), "the other holds it up");
    drop(two);
    common::poll(common::LIMIT, || (!up()).then_some(())).expect("the line goes down");
    stops_soon(vm);
}

#[test]
fn an_interrupt_event_ends_with_its_program() {
    let (vm, _dir) = saying("", &[]);
    let looks = attach(&vm);
    let up = || looks.pic_state(false).unwrap().last_irr & 4 != 0;
    let makes = attach(&vm);
    let event = makes.create_irq_event(10).unwrap();
    let kept = event.fd().try_clone_to_owned().unwrap();
    let raise = || assert_eq!(nix::unistd::write(&kept, &1u64.to_ne_bytes()), Ok(8));
    raise();
    common::poll(common::LIMIT, || up().then_some(())).expect("an interrupt");
    drop((event, makes));
    common::poll(common::LIMIT, || (!up()).then_some(())).expect("its line goes down");
    raise();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!up());
    stops_soon(vm);
}

/// A watcher that dies with an access takes it from nobody.
#[test]
fn each_watcher_sees_every_access_when_another_dies_over_one() {
    let (vm, _dir) = saying("", &[]);
    let (one, two) = (attach(&vm), attach(&vm));
    for watcher in [&one, &two] {
        watcher.watch_range(Space::Port, PORT, 1).unwrap();
    }
    let next = |vcpu: &cellblock_plugin_api::Vcpu| match vcpu.wait_timeout(SOON).unwrap() {
        Some(Event::Watched(access)) => access.data[0],
        other => panic!("{other:?}"),
    };
    let (first, second) = (one.vcpu(0).unwrap(), two.vcpu(0).unwrap());
    // The one that watched first may have had some before.
    let mut at = next(&first);
    while second.wait_timeout(Duration::from_millis(20)).unwrap().is_some() {
        second.resume().unwrap();
        at = next(&first);
    }
    first.resume().unwrap();
    for _ in 0..20 {
        assert_eq!(next(&second), at);
        second.resume().unwrap();
        let now = next(&first);
        assert_eq!(now, at.wrapping_add(1));
        at = now;
        first.resume().unwrap();
    }
    assert_eq!(next(&second), at);
    second.resume().unwrap();
    at = next(&first);
    drop((first, one));
    for n in 0..20u8 {
        assert_eq!(next(&second), at.wrapping_add(n));
        second.resume().unwrap();
    }
    stops_soon(vm);
}

/// The end does not wait for who fills the counter up that tells of it; and who has woken himself
/// by it is told all the same.
#[test]
fn the_end_is_told_whatever_is_in_the_counter() {
    let (vm, _dir) = saying("", &[]);
    let (full, woken) = (attach(&vm), attach(&vm));
    let (all, one) = (full.shutdown_event().unwrap(), woken.shutdown_event().unwrap());
    nix::unistd::write(&all, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    nix::unistd::write(&one, &1u64.to_ne_bytes()).unwrap();
    stops_soon(vm);
    let mut count = [0; 8];
    nix::unistd::read(&one, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 2);
}

/// What comes with the answer of one that takes part in a snapshot is closed where nobody waits.
#[test]
fn a_part_that_brings_what_does_not_close_holds_up_no_snapshot() {
    let (vm, dir) = saying("", &[]);
    drop(attach(&vm));
    let program = raw(&vm.path("plugin")).unwrap();
    ask(&program, &HELLO, &[]).0.unwrap();
    let (answer, fds) = ask(&program, &Request::TakePart { name: "slow".into() }, &[]);
    assert!(matches!(answer, Ok(Answer::Part(None))));
    let part = Channel::from_fd(fds.into_iter().next().unwrap());
    let (slow, _peer) = lingering();
    let answers = std::thread::spawn(move || {
        let (asked, _) = part.recv_timeout::<ToPart>(common::LIMIT).unwrap();
        let ToPart::Quiesce { epoch } = asked else { panic!("{asked:?}") };
        let (state, _) = Payload::new(b"slow".to_vec()).unwrap();
        part.send(&FromPart::Quiesced { epoch, state }, &[slow.as_fd()]).unwrap();
        let_go(slow);
        part.recv_timeout::<ToPart>(common::LIMIT).unwrap()
    });
    let begin = Instant::now();
    let taken = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .arg("snapshot")
        .args([vm.path("control"), dir.path().join("s")])
        .output()
        .unwrap();
    assert!(taken.status.success(), "{taken:?}");
    assert!(matches!(answers.join().unwrap().0, ToPart::Thaw { .. }));
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    stops_soon(vm);
}

#[test]
fn programs_and_what_they_make_have_a_limit() {
    let (vm, _dir) = saying("", &[]);
    let makes = attach(&vm);
    let channel = raw(&vm.path("plugin")).unwrap();
    ask(&channel, &HELLO, &[]).0.unwrap();
    let writing = Request::Writing { offset: 0, length: 1 };
    let full = (0..).find_map(|n| ask(&channel, &writing, &[]).0.err().map(|errno| (n, errno)));
    assert_eq!(full.unwrap(), (4096, libc::ENOSPC));
    // With those two, sixteen.
    let mut others: Vec<_> = (0..14).map(|_| attach(&vm)).collect();
    for _ in 0..3 {
        assert!(cellblock_plugin_api::Vm::attach(&vm.path("plugin")).is_err());
    }
    others.pop();
    drop(attach(&vm));
    makes.check_extension(0).unwrap();
    stops_soon(vm);
}

/// As many as a message can carry, from as many as may attach.
fn storm(path: &Path) {
    // The first four hold up whoever closes, and the rest remains to be closed.
    let (slow, _peers): (Vec<_>, Vec<_>) = (0..5).map(|_| lingering()).unzip();
    let rest = [slow[4].as_raw_fd(); 253];
    let mut first = rest;
    (0..4).for_each(|n| first[n] = slow[n].as_raw_fd());
    let programs: Vec<_> = (0..10)
        .map(|_| {
            let channel = raw(path).unwrap();
            ask(&channel, &HELLO, &[]).0.unwrap();
            channel
        })
        .collect();
    let bytes = cellblock_wire::encode(&HELLO).unwrap();
    for (n, channel) in programs.iter().enumerate() {
        let fds = if n == 0 { &first } else { &rest };
        let (bytes, rights) = ([IoSlice::new(&bytes)], [ControlMessage::ScmRights(fds)]);
        match sendmsg::<()>(channel.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None) {
            // A user has so many under way as a process may have open.
            Err(Errno::ETOOMANYREFS) if n > 1 => break,
            sent => sent.unwrap(),
        };
        if n == 0 {
            assert!(matches!(channel.recv_timeout::<Reply>(SOON), Err(ChannelError::Closed)));
        }
    }
    slow.into_iter().for_each(let_go);
    assert!(matches!(programs[1].recv_timeout::<Reply>(SOON), Err(ChannelError::Closed)));
}

#[test]
fn a_storm_of_what_does_not_close_holds_up_nobody() {
    if !common::is_root("becoming another user") {
        return;
    }
    // Another user than that of the tests beside this one, which shares limits with them.
    let (vm, _dir) = saying(",observe=65532", &FEW);
    let stays = attach(&vm);
    let mut observer = as_user(&vm, 65532, "storm");
    let mut out = std::io::BufReader::new(observer.stdout.take().unwrap());
    let (mut text, mut line) = (String::new(), String::new());
    while !line.contains("storm over") {
        text += &line;
        line.clear();
        assert!(std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0, "{text}");
    }
    let begin = Instant::now();
    stays.check_extension(0).unwrap();
    stays.memory().unwrap();
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    stops_soon(vm);
    observer.kill().unwrap();
    observer.wait().unwrap();
}

/// fds in answers that nobody reads would be the VMM's, which may have so many under way.
#[test]
fn answers_with_fds_are_read_one_by_one() {
    let (vm, _dir) = saying("", &[]);
    drop(attach(&vm));
    let channel = raw(&vm.path("plugin")).unwrap();
    let sent = (0..100).take_while(|_| channel.send(&HELLO, &[]).is_ok()).count();
    // Nothing is read until it has had enough of that.
    let ended = common::poll(SOON, || channel.is_closed().then_some(()));
    assert!(ended.is_some(), "{sent} requests for fds, and nothing read");
    let mut answers = 0;
    while channel.recv_timeout::<Reply>(SOON).is_ok_and(|(answer, fds)| {
        assert_eq!((answer.is_ok(), fds.len()), (true, 2));
        true
    }) {
        answers += 1;
    }
    assert!(sent > answers && answers < 2, "{answers} of {sent}");
    stops_soon(vm);
}
