//! `cellblock gdb`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use crate::control::client::Client;
use crate::control::protocol::{Reply, Request};
use crate::gdb;

const EXAMPLES: &str = "\
Example:
  cellblock run --kernel vmlinux --control /tmp/vm --plugin-socket /tmp/vm-plugin,memory=rw
  cellblock gdb /tmp/vm --listen /tmp/vm-gdb
  gdb vmlinux -ex 'target remote /tmp/vm-gdb'

Each vCPU is a thread. Breakpoints are the processor's: four of them. Memory is by the addresses of
the vCPU that gdb looks at, and can be written where the VM hands it out with memory=rw.
When gdb leaves, the guest runs on.";

/// Let gdb debug a running VM.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Gdb {
    /// The VM's control socket or its plugin socket
    #[arg(value_name = "CONTROL")]
    vm: PathBuf,
    /// Make a socket for gdb here
    #[arg(long, value_name = "PATH")]
    listen: PathBuf,
}

impl Gdb {
    pub(super) fn execute(self) -> Result<(), Failure> {
        let vm = plugin_socket(&self.vm);
        gdb::serve(&vm, &self.listen, || {
            println!("gdb: target remote {}", self.listen.display());
        })
        .map_err(Failure::error)
    }
}

/// Where to attach to the VM whose control socket this is; the path itself where it is none.
fn plugin_socket(path: &Path) -> PathBuf {
    let asked = Client::connect(path).and_then(|mut client| client.ask(Request::Stats));
    match asked {
        Ok((Reply::Stats(stats), _)) => stats.plugin_socket.unwrap_or_else(|| path.to_owned()),
        _ => path.to_owned(),
    }
}
