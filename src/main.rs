//! The `cellblock` program: the command line, and, started anew by its own spawner,
//! every device process.

use std::process::ExitCode;

use cellblock_devices::protocol::CELL_ARG;
use cellblock_seccomp::plugin;

fn main() -> ExitCode {
    // A device process is told apart before anything else happens in it.
    if std::env::args_os().nth(1).is_some_and(|word| word == CELL_ARG) {
        let args: Vec<String> =
            std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        if args.get(2).is_some_and(|role| role == plugin::ROLE) {
            plugin::stub::main();
        }
        cellblock_devices::cell::main(&args);
    }
    cellblock::cli::main(std::env::args_os())
}
