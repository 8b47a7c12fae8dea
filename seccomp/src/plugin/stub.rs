//! Our own program in a plugin's process, from its start by the spawner to exec.
//!
//! It reads the plan, enters the jail, and becomes the plugin: the jail stands before the
//! plugin's first instruction. Until exec a failure is told on the channel, as two lines
//! of text: the step, and the reason with its remedy. The channel's end without a
//! word is a plugin that runs. A message of one byte before that brings the listener of a
//! filter that asks.
#![allow(unsafe_code)] // exec, raw fds, the page with the secret address

use std::ffi::{CString, c_char};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

use nix::errno::Errno;

use super::plan::{JailText, Text};
use super::{REQUEST_FDS, root};
use crate::bpf::{argument, jump_equal, load, op_return};
use crate::jail::{self, JailError};
use crate::minijail::{Code, Filter};

// The request's fds, in its order, then the plan's.
const CHANNEL: RawFd = 3;
const SOCKET: RawFd = 4;
const STDERR: RawFd = 5;
const STDIN: RawFd = 6;
const STDOUT: RawFd = 7;
const PLAN: RawFd = CHANNEL + REQUEST_FDS as RawFd;

/// Longest report of a failure, in bytes.
pub const MAX_REPORT: usize = 1024;

/// Runs the stub. Must be called on the main thread, while it is the only one.
pub fn main() -> ! {
    let text = match become_plugin() {
        Ok(never) => match never {},
        Err(error) => format!("{}\n{}; {}", error.step, error.errno, error.remedy),
    };
    report(&text);
    // SAFETY: ends the process; nothing of it has to be cleaned up.
    unsafe { libc::_exit(127) }
}

/// The two parts of a report: the step, and the reason with its remedy.
pub fn parse_report(bytes: &[u8]) -> Option<(String, String)> {
    let text = String::from_utf8_lossy(bytes);
    let (step, message) = text.split_once('\n')?;
    Some((step.to_string(), message.to_string()))
}

fn report(text: &str) {
    let bytes = &text.as_bytes()[..text.len().min(MAX_REPORT)];
    // SAFETY: the bytes live; a closed fd is an error that changes nothing.
    unsafe { libc::write(CHANNEL, bytes.as_ptr().cast(), bytes.len()) };
}

fn become_plugin() -> Result<std::convert::Infallible, JailError> {
    const BUG: &str = "the VMM and the spawner do not fit together: this is a bug";
    jail::die_with_parent()?;
    let (text, mounts) = read_plan().map_err(JailError::new("read the plan", BUG))?;
    // SAFETY: sets a number of this process.
    unsafe { libc::umask(0o022) };
    arrange().map_err(JailError::new("arrange the plugin's fds", BUG))?;
    if let Some(jail) = &text.jail {
        enter(jail, mounts)?;
    }
    let image = Image::new(&text).map_err(JailError::new("prepare exec", BUG))?;
    if let Some(jail) = &text.jail {
        seal(&image, jail)?;
    }
    image.exec();
    // From here on only what the filter lets through by the page's address.
    image.report(&text, Errno::last());
    // SAFETY: as in `main`.
    unsafe { libc::_exit(127) }
}

fn seal(image: &Image, jail: &JailText) -> Result<(), JailError> {
    let filter = Filter::new(&image.filter(&jail.filter));
    let failed = JailError::new(
        "seal with seccomp",
        "the kernel needs CONFIG_SECCOMP_FILTER (with --seccomp-policy-dir: a shorter policy)",
    );
    if jail.asks {
        image.send(&filter.apply_asking().map_err(failed)?);
    } else if filter.apply().is_err() {
        return Err(failed(Errno::last()));
    }
    Ok(())
}

fn enter(jail: &JailText, mounts: Vec<OwnedFd>) -> Result<(), JailError> {
    let gathered = root::gather(&jail.shown, mounts)?;
    let writable: Vec<&Path> = jail
        .shown
        .iter()
        .filter(|shown| shown.writable)
        .map(|shown| Path::new(std::ffi::OsStr::from_bytes(&shown.destination)))
        .collect();
    jail::enter_plugin(|| gathered.enter(), &writable)
}

/// The plan's text, and its other fds: they are the last that are open.
fn read_plan() -> Result<(Text, Vec<OwnedFd>), Errno> {
    // SAFETY: the spawner left the plan there, and each number is taken once.
    let plan = File::from(unsafe { OwnedFd::from_raw_fd(PLAN) });
    let io = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    let mut bytes = vec![0; cellblock_wire::MAX_MESSAGE];
    let mut len = 0;
    loop {
        match plan.read_at(&mut bytes[len..], len as u64).map_err(io)? {
            0 => break,
            count => len += count,
        }
    }
    let text: Text = cellblock_wire::decode(&bytes[..len]).map_err(|_| Errno::EBADMSG)?;
    let is_mount = |s: &&super::plan::Shown| matches!(s.source, super::plan::Source::Mount);
    let count = text.jail.iter().flat_map(|jail| &jail.shown).filter(is_mount).count();
    // SAFETY: as above.
    let mount = |n| unsafe { OwnedFd::from_raw_fd(PLAN + 1 + n as RawFd) };
    Ok((text, (0..count).map(mount).collect()))
}

/// Standard input, output and error; the connection stays where it is; everything else
/// goes at exec.
fn arrange() -> Result<(), Errno> {
    for (from, to) in [(STDIN, 0), (STDOUT, 1), (STDERR, 2)] {
        // SAFETY: numbers only; nothing in this process owns 0 to 2.
        Errno::result(unsafe { libc::dup2(from, to) })?;
    }
    for (first, last) in [(CHANNEL, CHANNEL), (SOCKET + 1, RawFd::MAX)] {
        // SAFETY: marks fds close-on-exec; no memory is involved.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC)
        })?;
    }
    Ok(())
}

/// What exec needs, the program's path on a page of its own at a random address: the filter
/// allows execve of that address, and exec takes the page away. What runs then has to guess where
/// it was, map memory there, and would have a program of its own root executed under the same
/// filter.
struct Image {
    page: *mut u8,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

const PAGE: usize = 8192;
/// Where on the page a report is written, allowed by its address too.
const REPORT: usize = 4096;

impl Image {
    fn new(text: &Text) -> Result<Image, Errno> {
        let strings = |list: &[Vec<u8>]| {
            let of = |bytes: &Vec<u8>| CString::new(bytes.clone()).map_err(|_| Errno::EINVAL);
            list.iter().map(of).collect::<Result<Vec<_>, _>>()
        };
        let arguments = strings(&text.arguments)?;
        let mut environment = strings(&text.environment)?;
        environment
            .push(CString::new(format!("CROSVM_SOCKET={SOCKET}")).map_err(|_| Errno::EINVAL)?);
        if text.program.len() >= REPORT {
            return Err(Errno::ENAMETOOLONG);
        }
        let page = secret_page()?;
        // SAFETY: the page has room for the path and its end, as just checked; it is zero.
        unsafe { ptr::copy_nonoverlapping(text.program.as_ptr(), page, text.program.len()) };
        Ok(Image { page, arguments, environment })
    }

    /// `rest`, with execve of our page and writing of our report in front.
    fn filter(&self, rest: &Code) -> Code {
        const ALLOW: u32 = 0x7fff_0000;
        let mut code =
            vec![load(crate::bpf::ARCH_OFFSET), jump_equal(crate::bpf::AUDIT_ARCH_X86_64, 1, 0)];
        code.push(op_return(0x8000_0000)); // another architecture: killed
        let calls = [
            (libc::SYS_execve, 0, self.page as usize),
            (libc::SYS_sendmsg, 1, self.page as usize + REPORT),
            (libc::SYS_write, 1, self.page as usize + REPORT),
        ];
        for (number, arg, address) in calls {
            let (low, high) = argument(arg);
            code.push(load(crate::bpf::NUMBER_OFFSET));
            code.push(jump_equal(number as u32, 0, 5));
            code.push(load(low));
            code.push(jump_equal(address as u32, 0, 3));
            code.push(load(high));
            code.push(jump_equal((address as u64 >> 32) as u32, 0, 1));
            code.push(op_return(ALLOW));
        }
        let mut code: Code = code.iter().map(|i| (i.code, i.jt, i.jf, i.k)).collect();
        code.extend(rest);
        code
    }

    /// Hands the filter's listener to the VMM, by a message at the page's address. Without
    /// it calls outside the policy stand still for ever, which harms nobody else.
    fn send(&self, listener: &OwnedFd) {
        #[repr(C, align(8))]
        struct Control {
            header: libc::cmsghdr,
            fd: RawFd,
        }
        let header = libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + size_of::<RawFd>(),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        let mut control = Control { header, fd: listener.as_raw_fd() };
        let mut byte = 0u8;
        let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: the page has room for a message from there on and is aligned; all that the
        // message points to lives; a msghdr may be all zeroes.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_iov, message.msg_iovlen) = (&raw mut data, 1);
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = size_of::<Control>();
            let at = self.page.add(REPORT).cast::<libc::msghdr>();
            at.write(message);
            libc::syscall(libc::SYS_sendmsg, CHANNEL, at, 0);
        }
    }

    /// Returns only on failure.
    fn exec(&self) {
        let pointers = |list: &[CString]| -> Vec<*const c_char> {
            list.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
        };
        let (argv, envp) = (pointers(&self.arguments), pointers(&self.environment));
        // SAFETY: the path ends with a zero, both arrays with null, and all outlive the call.
        unsafe { libc::execve(self.page.cast(), argv.as_ptr(), envp.as_ptr()) };
    }

    fn report(&self, text: &Text, errno: Errno) {
        let remedy = match errno {
            Errno::EACCES => "let everyone execute the program (chmod o+rx)",
            Errno::ENOENT => "its loader is not in the jail: this is a bug",
            Errno::ENOEXEC => "it has to be a program for x86_64",
            _ => "see whether it runs with --disable-sandbox",
        };
        let path = String::from_utf8_lossy(&text.program);
        let line = format!("execute the plugin {path}\n{errno}; {remedy}");
        let len = line.len().min(MAX_REPORT);
        // SAFETY: the page has more than MAX_REPORT bytes from there on, and is ours.
        unsafe {
            let at = self.page.add(REPORT);
            ptr::copy_nonoverlapping(line.as_ptr(), at, len);
            libc::syscall(libc::SYS_write, CHANNEL, at, len);
        }
    }
}

/// Zeroed pages at a random address.
fn secret_page() -> Result<*mut u8, Errno> {
    for _ in 0..64 {
        let mut random = [0u8; 8];
        // SAFETY: the buffer lives.
        let count = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
        Errno::result(count)?;
        // Below the 47 bits of user addresses, page-aligned, above what may not be mapped.
        let address = (u64::from_ne_bytes(random) & 0x7fff_ffff_e000) | 0x1000_0000;
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        // SAFETY: NOREPLACE: nothing that is mapped is touched.
        let page = unsafe { libc::mmap(address as *mut _, PAGE, protection, flags, -1, 0) };
        if page != libc::MAP_FAILED {
            return Ok(page.cast());
        }
    }
    Err(Errno::ENOMEM)
}
