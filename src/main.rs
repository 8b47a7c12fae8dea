//! The `cellblock` program: the command line, and, started anew by its own spawner,
//! every device process.

use std::ffi::OsStr;
use std::process::ExitCode;

use cellblock_devices::protocol::CELL_ARG;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    // A device process is told apart before anything else happens in it.
    if args.nth(1).as_deref() == Some(OsStr::new(CELL_ARG)) {
        let mut word = || args.next().and_then(|word| word.into_string().ok()).unwrap_or_default();
        let (role, id) = (word(), word());
        cellblock_devices::cell::main(&role, &id);
    }
    cellblock::cli::main(std::env::args_os())
}
