//! The jail of a plugin: a program of somebody else's, run in a root of its own.
//!
//! | module | what it holds |
//! |---|---|
//! | `elf`, `cache`, `needs` | which files a program needs to start |
//! | `plan` | everything the jail is made of, opened and checked before the spawner is forked |
//! | [`stub`] | our own program in the new process: enters the jail, then becomes the plugin |
//! | `root` | the plugin's root directory |
//!
//! A plan is made while the user's command line is the only input there is, and fixed in
//! the spawner when it is forked. Nobody can ask it for another one later: a VMM in
//! somebody else's hands can have the same plugin started again, and that is all.
//!
//! The plugin's process is a child of the spawner like a device process: seven new
//! namespaces, unprivileged ids. Then the stub: root, limits, no capabilities,
//! no_new_privs, Landlock, seccomp, exec. The plugin is process 1 of its pid namespace,
//! so that everything it may have started ends with it.

mod cache;
mod elf;
mod needs;
mod plan;
mod root;
pub mod stub;

pub use elf::ElfError;
pub use needs::NeedsError;
pub use plan::{GidMap, Mount, Plan, PlanError, Spec};

/// Role of the request to the spawner that is answered by the plan.
pub const ROLE: &str = "plugin";
/// fds that the VMM sends with the request: the stub's channel, the plugin's connection
/// to the VMM, its standard error, input and output.
pub const REQUEST_FDS: usize = 5;
/// Most fds of a plan: its text, and what is shown in the root.
pub const MAX_PLAN_FDS: usize = 96;
