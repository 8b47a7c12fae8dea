//! The jailed program: does as a device process does, then what the test asks for.

use std::fs;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use cellblock_seccomp::filter::{self, Mode, Policy};
use cellblock_seccomp::{jail, violation};
use cellblock_wire::{Access, Channel, Mapping};
use serde::{Deserialize, Serialize};

/// First message; its fd is the violation page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    pub sandbox: bool,
    /// `blk` or `serial`; none leaves the process without a filter.
    pub policy: Option<String>,
    pub log: bool,
    /// Start a thread before the jail is entered.
    pub thread_first: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Ready,
    Failed(String),
    /// Result of a call: its value, or minus the errno.
    Value(i64),
    Text(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// A raw system call with these arguments.
    Call(i64, [u64; 6]),
    /// openat of this path.
    Open(String),
    /// The names in a folder, and whether it can be written to.
    Look,
    /// Have the thread from before the filter allocate and sleep.
    Thread,
    /// Start a thread under the filter.
    NewThread,
    /// Panic with a backtrace.
    Panic,
    /// A call in the thread from before the filter, called `worker`.
    CallInThread(i64),
    /// A 32-bit getpid by `int 0x80`.
    Call32,
    /// A write to address 8.
    Fault,
    /// Exit with this status.
    Exit(i32),
}

pub fn main() -> ! {
    // SAFETY: the spawner made fd 3 the channel and nothing else knows it.
    let channel = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(3) });
    // The second socket, if there is one, stays open as a device's would.
    let four = fs::symlink_metadata("/proc/self/fd/4").is_ok();
    jail::close_others(if four { &[0, 1, 2, 3, 4] } else { &[0, 1, 2, 3] }).expect("close");
    jail::die_with_parent().expect("pdeathsig");
    let Ok((hello, fds)) = channel.recv::<Hello>() else { std::process::exit(0) };
    let worker = match start(&hello, fds) {
        Ok(worker) => worker,
        Err(e) => {
            channel.send(&Answer::Failed(e), &[]).expect("send");
            std::process::exit(1);
        }
    };
    channel.send(&Answer::Ready, &[]).expect("send");
    while let Ok((ask, fds)) = channel.recv::<Ask>() {
        assert!(fds.is_empty());
        let answer = obey(ask, worker.as_ref());
        channel.send(&answer, &[]).expect("send");
    }
    std::process::exit(0);
}

/// A thread that does what it is sent.
struct Worker {
    jobs: Sender<Box<dyn FnOnce() -> i64 + Send>>,
    results: Receiver<i64>,
}

impl Worker {
    fn start() -> Result<Worker, String> {
        let (jobs, inbox) = channel::<Box<dyn FnOnce() -> i64 + Send>>();
        let (outbox, results) = channel();
        let running = outbox.clone();
        let work = move || {
            running.send(0).expect("waited for");
            while let Ok(job) = inbox.recv() {
                outbox.send(job()).expect("waited for");
            }
        };
        let builder = std::thread::Builder::new().name("worker".into());
        builder.spawn(work).map_err(|e| e.to_string())?;
        let worker = Worker { jobs, results };
        worker.results.recv().map_err(|e| e.to_string())?;
        Ok(worker)
    }

    fn run(&self, job: impl FnOnce() -> i64 + Send + 'static) -> Answer {
        self.jobs.send(Box::new(job)).expect("worker lives");
        Answer::Value(self.results.recv().expect("worker lives"))
    }
}

fn start(hello: &Hello, fds: Vec<OwnedFd>) -> Result<Option<Worker>, String> {
    let page = fds.first().ok_or("no page")?;
    let page = Mapping::new(page.as_fd(), violation::PAGE, Access::ReadWrite)
        .map_err(|e| e.to_string())?;
    if hello.thread_first {
        std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(3600)));
    }
    if hello.sandbox {
        jail::enter().map_err(|e| e.to_string())?;
    }
    violation::install(page, "test").map_err(|e| e.to_string())?;
    let policy = match hello.policy.as_deref() {
        Some("blk") => Policy::Blk,
        Some("serial") => Policy::Serial,
        _ => return Ok(None),
    };
    // A thread from before the filter is under it as well.
    let worker = Worker::start()?;
    let mode = if hello.log { Mode::Log } else { Mode::Kill };
    filter::seal(policy, mode).map_err(|e| format!("{e}: {:?}", std::error::Error::source(&e)))?;
    Ok(Some(worker))
}

fn call(number: i64, a: [u64; 6]) -> i64 {
    // SAFETY: the tests pass arguments that touch no memory of this process, or
    // constants such as null that the kernel answers with an errno.
    let result = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if result < 0 { -i64::from(nix::errno::Errno::last_raw()) } else { result }
}

fn obey(ask: Ask, worker: Option<&Worker>) -> Answer {
    match ask {
        Ask::Call(number, arguments) => Answer::Value(call(number, arguments)),
        Ask::Open(path) => match fs::File::open(path) {
            Ok(_) => Answer::Value(0),
            Err(e) => Answer::Value(-i64::from(e.raw_os_error().unwrap_or(0))),
        },
        Ask::Look => {
            let names: Vec<_> = match fs::read_dir("/") {
                Ok(list) => list.flatten().map(|e| e.file_name()).collect(),
                Err(e) => return Answer::Text(e.to_string()),
            };
            let write = fs::write("/x", "x").expect_err("not writable").to_string();
            let up = fs::read_dir("/..").map(|d| d.count()).unwrap_or(99);
            Answer::Text(format!("{names:?} {up} {write}"))
        }
        Ask::Thread => worker.expect("under a filter").run(|| {
            let mut blocks: Vec<Vec<u8>> = (0..64).map(|i| vec![1; i * 10_000]).collect();
            blocks.retain(|b| b.len() % 20_000 == 0);
            let map: std::collections::HashMap<_, _> = blocks.iter().enumerate().collect();
            std::thread::sleep(std::time::Duration::from_millis(1));
            map.len() as i64
        }),
        Ask::NewThread => {
            let thread = std::thread::spawn(|| 1).join();
            Answer::Value(thread.expect("join"))
        }
        Ask::Panic => {
            std::panic::set_hook(Box::new(|info| {
                let trace = std::backtrace::Backtrace::force_capture();
                // The text is made, symbols looked for, and written to /dev/null.
                eprintln!("{info}\n{trace}");
                std::process::exit(101);
            }));
            panic!("as asked");
        }
        Ask::CallInThread(number) => {
            worker.expect("under a filter").run(move || call(number, [0; 6]))
        }
        Ask::Call32 => {
            let result: i64;
            // SAFETY: getpid (20 in the 32-bit table) has no arguments.
            unsafe {
                std::arch::asm!("int 0x80", inlateout("rax") 20i64 => result,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
            Answer::Value(result)
        }
        Ask::Fault => {
            // SAFETY: none: the fault is the purpose, and the process ends.
            unsafe { std::ptr::without_provenance_mut::<u64>(8).write_volatile(1) };
            Answer::Value(0)
        }
        Ask::Exit(status) => std::process::exit(status),
    }
}
