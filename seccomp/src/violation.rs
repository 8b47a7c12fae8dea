//! A refused system call, named.
//!
//! The filter raises SIGSYS in the thread that made the call. The handler writes
//! call, architecture, thread id and thread name to a page shared with the VMM,
//! prints the same as one line to standard error (which in a device process is
//! /dev/null), and ends the process with status [`EXIT_STATUS`].
#![allow(unsafe_code)] // a signal handler and its installation

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use cellblock_wire::{Mapping, ShmError, sealed_memfd};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::syscalls;

/// Bytes of a violation page.
pub const PAGE: usize = 4096;
/// Exit status of a process that was ended by a violation: 128 + SIGSYS.
pub const EXIT_STATUS: i32 = 159;

// Layout of the page. The state goes from EMPTY to WRITING (by whoever violates
// first) to WRITTEN.
const STATE: usize = 0;
const ARCH: usize = 4;
const SYSCALL: usize = 8;
const TID: usize = 16;
const COMM: usize = 24;
const COMM_LEN: usize = 16;
const EMPTY: u32 = 0;
const WRITING: u32 = 1;
const WRITTEN: u32 = 2;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const MAX_PROCESS_NAME: usize = 32;

/// Why a violation handler could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The process has one already.
    #[error("the violation handler is already installed")]
    Twice,
    /// The page is too small or read-only.
    #[error("the violation page is not a writable page of {PAGE} bytes")]
    Page,
    /// The kernel refused the handler.
    #[error("installing the handler of SIGSYS")]
    Handler(#[source] Errno),
}

struct Report {
    page: Mapping,
    process: [u8; MAX_PROCESS_NAME],
    process_len: usize,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Creates a violation page: a memfd of [`PAGE`] bytes that cannot be resized.
pub fn new_page() -> Result<OwnedFd, ShmError> {
    sealed_memfd("violation", PAGE as u64)
}

/// Installs the handler of SIGSYS for this process, which reports to `page`.
///
/// To be called before a filter stands (afterwards the handler cannot be
/// changed). `process` is how the line on standard error names the process; what
/// is longer than 32 bytes is cut.
pub fn install(page: Mapping, process: &str) -> Result<(), InstallError> {
    if page.len() < PAGE || page.access() != cellblock_wire::Access::ReadWrite {
        return Err(InstallError::Page);
    }
    let mut name = [0; MAX_PROCESS_NAME];
    let len = process.len().min(MAX_PROCESS_NAME);
    name[..len].copy_from_slice(&process.as_bytes()[..len]);
    REPORT
        .set(Report { page, process: name, process_len: len })
        .map_err(|_| InstallError::Twice)?;
    // On the alternate stack where the thread has one: the call may have been
    // made with the stack nearly used up.
    let action = SigAction::new(
        SigHandler::SigAction(on_sigsys),
        SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK,
        SigSet::empty(),
    );
    // SAFETY: the handler only makes async-signal-safe calls; see there.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map_err(InstallError::Handler)?;
    Ok(())
}

/// siginfo_t as the kernel fills it for SIGSYS (include/uapi/asm-generic/siginfo.h);
/// libc has no accessors for these fields.
#[repr(C)]
struct SigsysInfo {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    call_addr: usize,
    syscall: i32,
    arch: u32,
}

/// si_code of a SIGSYS raised by a filter.
const SYS_SECCOMP: i32 = 1;

/// Async-signal-safe: atomics on a mapped page, a fixed buffer, and raw calls
/// that every policy allows (prctl PR_GET_NAME, gettid, write, exit_group).
extern "C" fn on_sigsys(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t, of which this is
    // the SIGSYS view; it is larger than SigsysInfo and equally aligned.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    // A SIGSYS sent by kill() names no call: the fields read as other data.
    let (syscall, arch) =
        if info.code == SYS_SECCOMP { (i64::from(info.syscall), info.arch) } else { (-1, 0) };
    let mut comm = [0u8; COMM_LEN];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, comm.as_mut_ptr()) };
    // SAFETY: gettid has no arguments and cannot fail.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    if let Some(report) = REPORT.get() {
        let state = report.page.u32(STATE);
        let first = state.compare_exchange(EMPTY, WRITING, Ordering::AcqRel, Ordering::Acquire);
        if first.is_err() {
            // Another thread is reporting and ends the process within microseconds;
            // ending it here could cut its report short.
            for _ in 0..1000 {
                // SAFETY: sched_yield has no arguments.
                unsafe { libc::sched_yield() };
            }
        } else {
            report.page.u32(ARCH).store(arch, Ordering::Relaxed);
            report.page.u64(SYSCALL).store(syscall as u64, Ordering::Relaxed);
            report.page.u32(TID).store(tid as u32, Ordering::Relaxed);
            for (i, byte) in comm.iter().enumerate() {
                report.page.u8(COMM + i).store(*byte, Ordering::Relaxed);
            }
            state.store(WRITTEN, Ordering::Release);
            print(report, syscall, arch, tid, &comm);
        }
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(EXIT_STATUS) };
}

/// One line on standard error.
fn print(report: &Report, syscall: i64, arch: u32, tid: i32, comm: &[u8; COMM_LEN]) {
    let mut line = Line { bytes: [0; 192], len: 0 };
    line.push(b"cellblock: process ");
    line.push(&report.process[..report.process_len]);
    line.push(b", thread ");
    let end = comm.iter().position(|b| *b == 0).unwrap_or(COMM_LEN);
    line.push(&comm[..end]);
    line.push(b" (");
    line.number(i64::from(tid));
    line.push(b"): system call ");
    if arch == AUDIT_ARCH_X86_64 {
        line.push(syscalls::name(syscall).unwrap_or("unknown").as_bytes());
    } else {
        line.push(b"of another architecture");
    }
    line.push(b" (");
    line.number(syscall);
    line.push(b") is not in its seccomp policy; process ended\n");
    // SAFETY: the buffer is valid for `len` bytes; a failure leaves nothing to do.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
}

/// A line built without allocating; what does not fit is cut.
struct Line {
    bytes: [u8; 192],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, value: i64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        let mut rest = value.unsigned_abs();
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if value < 0 {
            self.push(b"-");
        }
        self.push(&digits[at..]);
    }
}

/// A refused system call, as a process reported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the call in `arch`.
    pub syscall: i64,
    /// AUDIT_ARCH_* value.
    pub arch: u32,
    /// Thread id, as numbered in the process's own pid namespace.
    pub tid: i32,
    /// Name of the thread: printable ASCII, at most 15 bytes.
    pub thread: String,
}

impl Violation {
    /// Name and number of the call: `openat (257)`.
    pub fn call(&self) -> String {
        let name = match self.arch {
            AUDIT_ARCH_X86_64 => syscalls::name(self.syscall).unwrap_or("unknown"),
            _ => "of another architecture",
        };
        format!("{name} ({})", self.syscall)
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system call {} by thread {} ({})", self.call(), self.thread, self.tid)
    }
}

/// The violation that was written to `page`, if there is one.
///
/// The page belongs to a process that may lie: the result is a copy, its text is
/// made printable, and no field of it should be used for more than a message.
pub fn read(page: &Mapping) -> Option<Violation> {
    if page.u32(STATE).load(Ordering::Acquire) != WRITTEN {
        return None;
    }
    let mut thread = String::with_capacity(COMM_LEN);
    for i in 0..COMM_LEN - 1 {
        match page.u8(COMM + i).load(Ordering::Relaxed) {
            0 => break,
            byte if byte.is_ascii_graphic() || byte == b' ' => thread.push(char::from(byte)),
            _ => thread.push('?'),
        }
    }
    Some(Violation {
        syscall: page.u64(SYSCALL).load(Ordering::Relaxed) as i64,
        arch: page.u32(ARCH).load(Ordering::Relaxed),
        tid: page.u32(TID).load(Ordering::Relaxed) as i32,
        thread,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cellblock_wire::Access;

    fn page() -> Mapping {
        Mapping::new(new_page().expect("page"), PAGE, Access::ReadWrite).expect("map")
    }

    #[test]
    fn an_untouched_page_reports_nothing() {
        assert_eq!(read(&page()), None);
    }

    #[test]
    fn a_lying_page_yields_printable_text() {
        let page = page();
        page.u64(SYSCALL).store(u64::MAX, Ordering::Relaxed);
        page.u32(ARCH).store(AUDIT_ARCH_X86_64, Ordering::Relaxed);
        page.u32(TID).store(u32::MAX, Ordering::Relaxed);
        for i in 0..PAGE - COMM {
            page.u8(COMM + i).store(0x1b, Ordering::Relaxed);
        }
        assert_eq!(read(&page), None, "state is not `written`");
        page.u32(STATE).store(WRITTEN, Ordering::Relaxed);
        let text = read(&page).expect("written").to_string();
        assert_eq!(text, format!("system call unknown (-1) by thread {} (-1)", "?".repeat(15)));
    }

    #[test]
    fn numbers_print_without_allocation() {
        for value in [0, 7, -1, 257, i64::MAX, i64::MIN] {
            let mut line = Line { bytes: [0; 192], len: 0 };
            line.number(value);
            assert_eq!(&line.bytes[..line.len], value.to_string().as_bytes());
        }
    }

    #[test]
    fn names_match_the_kernel_headers() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_openat, "openat"),
            (libc::SYS_rseq, "rseq"),
            (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_futex_waitv, "futex_waitv"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(syscalls::name(number), Some(name));
            assert_eq!(syscalls::number(name), Some(number));
        }
        for hole in [-1, 335, 423, 470, i64::MAX] {
            assert_eq!(syscalls::name(hole), None);
        }
    }
}
