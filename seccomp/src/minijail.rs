//! minijail's text policies, compiled by us.
//!
//! One rule a line: which calls, and what happens to them.
//!
//! ```text
//! # comments, and lines that a backslash at their end continues
//! read: 1
//! {write, writev}: allow
//! open: return ENOENT
//! mmap: arg2 in ~PROT_EXEC || arg3 == MAP_PRIVATE && arg4 != -1; return EPERM
//! @include common.policy
//! ```
//!
//! | form | the call is |
//! |---|---|
//! | `1`, `allow` | allowed |
//! | `return ERRNO` | not made; it fails with that name or number |
//! | `kill`, `kill-process`, `kill-thread`, `trap`, `log` | as named |
//! | `EXPRESSION` | allowed where it holds, otherwise as if it were not in the policy |
//! | `EXPRESSION; return ERRNO` | allowed where it holds, otherwise failed |
//! | `EXPRESSION; kill` or another action | the action where it does not hold |
//!
//! An expression is tests joined by `&&` and `||` (`&&` binds closer). A test is `argN
//! OP VALUE`: `==`, `!=`, `<`, `<=`, `>`, `>=` compare all 64 bits, unsigned; `argN &
//! VALUE` wants one of the bits set, `argN in VALUE` no other bit set. A value is made of numbers (decimal, `0x`, `0` octal,
//! negative) and names, by `|`, `~` and parentheses. What a policy does not name ends
//! the process, or does what `@default ACTION` says. Paths of `@include` are relative
//! to the file they stand in. `@frequency` is only a hint, and passed over.

mod constants;
mod parse;
mod program;
mod replaced;

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use serde::{Deserialize, Serialize};

use seccompiler::sock_filter;

pub use program::Code;

/// A policy that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file of it could not be read.
    #[error("reading the seccomp policy {}{}", path.display(), included(from))]
    Read {
        /// The file.
        path: PathBuf,
        /// File and line that include it.
        from: Option<(PathBuf, usize)>,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// A line says what it may not.
    #[error("seccomp policy {}, line {line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The whole of it is more than the kernel takes.
    #[error("seccomp policy {}: {message}", path.display())]
    Whole {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

fn included(from: &Option<(PathBuf, usize)>) -> String {
    from.as_ref()
        .map(|(path, line)| format!(" that {}, line {line} includes", path.display()))
        .unwrap_or_default()
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Allow,
    Errno(u16),
    /// Whatever calls outside the policy get.
    Default,
    KillProcess,
    KillThread,
    Trap,
    Log,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Some of the bits are set.
    Any,
    /// No other bit is set.
    In,
}

/// A test of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Test {
    arg: u8,
    op: Op,
    value: u64,
}

/// What happens to one call: allowed where all tests of one of the alternatives
/// hold, else `otherwise`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    any: Vec<Vec<Test>>,
    otherwise: Action,
}

/// What happens on a call that a policy does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Violation {
    /// The process is killed by SIGSYS.
    Kill,
    /// The kernel logs the call and lets it through.
    Log,
    /// Whoever has the filter's listener is asked; until the answer the call stands still.
    Notify,
}

/// A policy file and all it includes, checked.
#[derive(Clone, Debug)]
pub struct Policy {
    path: PathBuf,
    rules: Vec<(i64, Rule)>,
    default: Action,
}

impl Policy {
    /// Reads the policy at `path`.
    pub fn read(path: &Path) -> Result<Policy, PolicyError> {
        parse::file(path)
    }

    /// A policy that is part of the program; `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Policy, PolicyError> {
        parse::text(Path::new(name), text)
    }

    /// Allows what `more` allows as well: its rules come first, and where they do not
    /// hold this policy's own decide, refusals included.
    #[must_use]
    pub fn and(mut self, more: &Policy) -> Policy {
        for (call, rule) in &more.rules {
            match self.rules.iter_mut().find(|(own, _)| own == call) {
                Some((_, own)) => {
                    let mut any = rule.any.clone();
                    any.append(&mut own.any);
                    own.any = any;
                }
                None => self.rules.push((*call, rule.clone())),
            }
        }
        self
    }

    /// The BPF program for x86_64, which starts by loading what it needs.
    pub fn compile(&self, violation: Violation) -> Result<Code, PolicyError> {
        program::compile(self, violation)
            .map_err(|message| PolicyError::Whole { path: self.path.clone(), message })
    }

    /// The policy for plugins where the user names none (`policies/plugin.policy`).
    pub fn for_plugins() -> Result<Policy, PolicyError> {
        Policy::parse("plugin.policy", include_str!("../policies/plugin.policy"))
    }

    /// What a program needs to get to its `main`, added to every policy of a plugin
    /// (`policies/plugin-startup.policy`).
    pub fn for_startup() -> Result<Policy, PolicyError> {
        Policy::parse("plugin-startup.policy", include_str!("../policies/plugin-startup.policy"))
    }
}

// include/uapi/linux/seccomp.h: SECCOMP_FILTER_FLAG_NEW_LISTENER.
const NEW_LISTENER: libc::c_ulong = 1 << 3;

/// A compiled policy, ready for [`Filter::apply`].
#[derive(Clone, Debug)]
pub struct Filter(Vec<sock_filter>);

impl Filter {
    /// From [`Policy::compile`].
    pub fn new(code: &Code) -> Filter {
        let of = |&(code, jt, jf, k): &(u16, u8, u8, u32)| sock_filter { code, jt, jf, k };
        Filter(code.iter().map(of).collect())
    }

    /// Puts the calling thread, and what it becomes and starts, under the filter. Sets
    /// no_new_privs.
    pub fn apply(&self) -> Result<(), seccompiler::Error> {
        seccompiler::apply_filter(&self.0)
    }

    /// As [`Filter::apply`], for a filter that asks: with its listener. no_new_privs must be
    /// set already.
    #[allow(unsafe_code)] // seccomp has no wrapper for this
    pub fn apply_asking(&self) -> Result<OwnedFd, Errno> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len()).map_err(|_| Errno::E2BIG)?,
            filter: self.0.as_ptr().cast_mut().cast(),
        };
        let (operation, flags) = (libc::SECCOMP_SET_MODE_FILTER, NEW_LISTENER);
        // SAFETY: the kernel reads the program, whose instructions have libc's layout; the
        // result is a new fd that nobody else knows.
        unsafe {
            let fd = libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program);
            Ok(OwnedFd::from_raw_fd(Errno::result(fd)? as i32))
        }
    }
}
