//! Cellblock's jails: the processes of one VM, who makes them, and what they may do.
//!
//! - [`spawner`]: a small single-threaded process, forked before anything else,
//!   that builds jailed processes on request and ends them all when the VMM dies.
//! - [`jail`]: what a new process does to itself before it reads anything that a
//!   guest could have influenced: empty root, limits, no capabilities.
//! - [`filter`]: seccomp, last: a policy per kind of process and VMM thread.
//! - [`minijail`]: seccomp for plugins: text policies, compiled when they are read.
//! - [`plugin`]: the jail of a program of somebody else's, and our stub that becomes it.
//! - [`violation`]: a refused system call is reported by name, not as a bare signal.
//!
//! Order in a device process: the spawner's part (namespaces, id maps, fds, exec),
//! [`jail::close_others`], [`jail::enter`], [`violation::install`], then its own
//! preparation, then [`filter::seal`].

mod bpf;
pub mod filter;
pub mod jail;
pub mod minijail;
pub mod plugin;
pub mod spawner;
mod syscalls;
pub mod violation;
