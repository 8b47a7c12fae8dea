//! The command line: one file per subcommand.
//!
//! Exit status: 0 the guest shut down or the command did what it was asked, 1 an
//! error, 2 wrong usage. An error is one line on standard error: what was being done,
//! why it failed, what to do.

mod control;
mod demo;
mod describe;
mod events;
mod gdb;
mod merge;
mod output;
mod pause;
mod plugin_args;
mod pool;
mod pool_shell;
mod ps;
mod reset;
mod restore;
mod resume;
mod run;
mod snapshot;
mod stats;
mod stop;
mod throttle;
mod verify;
mod vhost_user_blk;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cellblock_devices::protocol::LogLevel;
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::remedy::{Remedy, one_line, printable};
use crate::{logging, open_files, terminal};

const ABOUT: &str = "Run a virtual machine whose every device is a jailed process of its own";

const EXAMPLES: &str = "\
Examples:
  cellblock demo
  cellblock run --kernel vmlinux --cmdline 'console=ttyS0 root=/dev/vda' --disk root.img
  cellblock run --kernel bzImage --initrd initrd.img -c 2 -m 1G --control /tmp/vm
  cellblock ps /tmp/vm
  cellblock pause /tmp/vm && cellblock resume /tmp/vm

Exit status: 0 the guest shut down, or the command did what it was asked;
1 an error (one line on standard error says what, and what to do); 2 wrong usage,
or a damaged snapshot that was described.";

#[derive(Debug, Parser)]
#[command(name = "cellblock", version, about = ABOUT, after_help = EXAMPLES)]
#[command(arg_required_else_help = true, propagate_version = true)]
struct Cli {
    /// What to log on standard error: error, warn, info, debug or trace
    /// [default: $CELLBLOCK_LOG, else warn]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = logging::level)]
    log: Option<LogLevel>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Demo),
    Run(Box<run::Run>),
    Restore(Box<restore::Restore>),
    Reset(reset::Reset),
    Snapshot(snapshot::Snapshot),
    SnapshotMerge(merge::Merge),
    Pause(pause::Pause),
    Resume(resume::Resume),
    Stop(stop::Stop),
    Stats(stats::Stats),
    Throttle(throttle::Throttle),
    Ps(ps::Ps),
    Events(events::Events),
    Describe(describe::Describe),
    Verify(verify::Verify),
    Gdb(gdb::Gdb),
    VhostUserBlk(vhost_user_blk::VhostUserBlk),
    Pool(pool::Pool),
    #[command(hide = true)]
    PoolShell(pool_shell::PoolShell),
}

/// A command that did not succeed.
#[derive(Debug)]
enum Failure {
    /// Exit status 1, and the line.
    Error(String),
    /// Exit status 2, and the line.
    Usage(String),
    /// Exit status 2 as well, and the line: what was described is not to be used.
    Damaged(String),
    /// Nobody reads our output any more: the end, and no failure of ours.
    Unread,
}

impl Failure {
    fn error(error: impl Remedy) -> Failure {
        Failure::Error(one_line(&error))
    }
}

/// Has a signal to end set `cancel`, so that what is being written is taken away.
fn cancel_on_signals(cancel: &Arc<AtomicBool>) -> Result<(), Failure> {
    [SIGINT, SIGTERM, SIGHUP].into_iter().try_for_each(|signal| {
        let taken = signal_hook::flag::register(signal, cancel.clone());
        taken.map(drop).map_err(|e| Failure::Error(format!("taking signals over: {e}")))
    })
}

/// Runs the program with `args`, the program's name first.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    open_files::raise_limit();
    let outcome = match Cli::try_parse_from(merge::one_word(args)) {
        Ok(cli) => cli.execute(),
        Err(error) => usage(&error),
    };
    // What a command holds is dropped by now; this is for what it may have leaked.
    terminal::restore();
    let (status, line) = match outcome {
        Ok(()) | Err(Failure::Unread) => return ExitCode::SUCCESS,
        Err(Failure::Error(line)) => (1, line),
        Err(Failure::Usage(line) | Failure::Damaged(line)) => (2, line),
    };
    // With standard error closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "cellblock: error: {line}");
    ExitCode::from(status)
}

impl Cli {
    fn execute(self) -> Result<(), Failure> {
        // A VM's level may also come from its configuration file.
        if let Command::Run(run) = self.command {
            return run.execute(self.log);
        }
        let level = logging::choose(self.log).map_err(Failure::Usage)?;
        logging::init(level);
        match self.command {
            Command::Demo(demo) => demo.execute(),
            Command::Run(run) => run.execute(self.log),
            Command::Restore(restore) => restore.execute(level),
            Command::Reset(reset) => reset.execute(),
            Command::SnapshotMerge(merge) => merge.execute(),
            Command::Snapshot(snapshot) => snapshot.execute(),
            Command::Pause(pause) => pause.execute(),
            Command::Resume(resume) => resume.execute(),
            Command::Stop(stop) => stop.execute(),
            Command::Stats(stats) => stats.execute(),
            Command::Throttle(throttle) => throttle.execute(),
            Command::Ps(ps) => ps.execute(),
            Command::Events(events) => events.execute(),
            Command::Describe(describe) => describe.execute(),
            Command::Verify(verify) => verify.execute(),
            Command::Gdb(gdb) => gdb.execute(),
            Command::VhostUserBlk(serve) => serve.execute(level),
            Command::Pool(pool) => pool.execute(level),
            Command::PoolShell(shell) => shell.execute(),
        }
    }
}

/// Help goes out as it is; wrong usage becomes one line.
fn usage(error: &clap::Error) -> Result<(), Failure> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            output::print(&error.render().to_string())
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Err(Failure::Usage(
            "no command given; 'cellblock demo' is a tour, 'cellblock --help' lists them".into(),
        )),
        _ => Err(Failure::Usage(usage_line(&error.render().to_string()))),
    }
}

/// The paragraphs of clap's message before its usage lines, as one line.
fn usage_line(message: &str) -> String {
    let mut line = String::new();
    for part in message.lines().map(str::trim) {
        let part = part.strip_prefix("error: ").unwrap_or(part);
        if part.starts_with("Usage:") || part.starts_with("For more information") {
            break;
        }
        if !part.is_empty() {
            if !line.is_empty() {
                line.push_str(if line.ends_with(':') { " " } else { ", " });
            }
            line.push_str(part);
        }
    }
    line.push_str("; '--help' shows how");
    printable(&line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line() {
        let args = ["cellblock", "pause"].map(OsString::from);
        let error = Cli::try_parse_from(args).unwrap_err();
        let Err(Failure::Usage(line)) = usage(&error) else { panic!("not a usage error") };
        assert_eq!(
            line,
            "the following required arguments were not provided: <CONTROL>; '--help' shows how"
        );
    }
}
