//! One client of the service, and the VM that it has.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::protocol::{Answer, Claimed, MAX_LINE, Request, from_hex, line};
use super::{Shared, complaint, micros};
use crate::pool::{ClaimOrder, PooledRestoreVm};
use crate::remedy::{Remedy, chain};
use crate::vmm::restore::DiskOverride;

/// A client that does not take its answer for so long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Serves the client until its connection ends, and with it the VM's time.
pub(super) fn run(shared: &Shared, stream: &UnixStream) {
    if stream.set_write_timeout(Some(WRITE_LIMIT)).is_err() {
        return;
    }
    let mut connection =
        Connection { shared, stream, buffer: Vec::new(), vm: None, drained: false };
    // How it ended is the client's affair.
    let _ = connection.serve();
}

struct Connection<'a> {
    shared: &'a Shared,
    stream: &'a UnixStream,
    /// What came and is no whole line yet.
    buffer: Vec<u8>,
    vm: Option<PooledRestoreVm>,
    /// It has had the pool drained, and is yet to be told.
    drained: bool,
}

impl Connection<'_> {
    fn serve(&mut self) -> io::Result<()> {
        while let Some(request) = self.next_line()? {
            let answer = match serde_json::from_slice(&request) {
                Ok(request) => self.answer(request),
                Err(error) => {
                    let answer = complaint(&format!("that is no request: {error}"));
                    return self.say(&answer);
                }
            };
            let said = self.say(&answer);
            // Not before: with the service its connections end.
            if std::mem::take(&mut self.drained) {
                self.shared.end_when_empty();
            }
            said?;
        }
        Ok(())
    }

    fn say(&mut self, answer: &Answer) -> io::Result<()> {
        self.stream.write_all(&line(answer))
    }

    /// The next line, or nothing at the end of the connection or of the VM.
    fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut found = std::mem::replace(&mut self.buffer, rest);
                found.pop();
                return Ok(Some(found));
            }
            if self.buffer.len() > MAX_LINE {
                self.say(&complaint("a line has an end"))?;
                return Ok(None);
            }
            if self.wait()? {
                self.vm = None;
                self.say(&Answer::Ended)?;
                return Ok(None);
            }
            let mut part = [0; 4096];
            match (&mut &*self.stream).read(&mut part) {
                Ok(0) => return Ok(None),
                Ok(n) => self.buffer.extend_from_slice(&part[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the client says something; true if its VM ends first.
    fn wait(&self) -> io::Result<bool> {
        loop {
            let mut fds = vec![PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            // Of the VM only its end is of interest.
            fds.extend(self.vm.iter().map(|vm| PollFd::new(vm.as_fd(), PollFlags::empty())));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let some = |fd: &PollFd<'_>| fd.revents().is_some_and(|flags| !flags.is_empty());
            if some(&fds[0]) {
                return Ok(false);
            }
            if fds.get(1).is_some_and(some) {
                return Ok(true);
            }
        }
    }

    fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::Stats => Answer::Stats(Box::new(self.shared.pool.stats())),
            Request::Drain => {
                let gone = self.shared.pool.drain();
                self.drained = true;
                match gone {
                    true => Answer::Drain { in_use: self.shared.pool.stats().in_use },
                    false => complaint("idle VMs are slow to end; they end with the pool"),
                }
            }
            Request::Release => match self.vm.take() {
                Some(vm) => {
                    drop(vm);
                    self.shared.ring();
                    Answer::Release
                }
                None => complaint("this connection has no VM"),
            },
            Request::Claim { .. } if self.vm.is_some() => {
                complaint("this connection has a VM already: one at a time")
            }
            Request::Claim { data, data_hex, disks, snapshot, timeout_us } => {
                let begun = Instant::now();
                let data = match (data, data_hex.as_deref().map(from_hex)) {
                    (Some(text), None) => text.into_bytes(),
                    (None, Some(Some(bytes))) => bytes,
                    (None, None) => Vec::new(),
                    (_, Some(None)) => return complaint("data_hex is no hexadecimal digits"),
                    (Some(_), Some(_)) => return complaint("data comes as text or as digits"),
                };
                let disks: Result<Vec<DiskOverride>, String> =
                    disks.iter().map(|disk| disk.parse()).collect();
                let disks = match disks {
                    Ok(disks) => disks,
                    Err(why) => return complaint(&format!("disks: {why}")),
                };
                let relative = disks.iter().find_map(DiskOverride::relative);
                let relative = relative.or(snapshot.as_deref().filter(|path| path.is_relative()));
                if let Some(path) = relative {
                    let path = path.display();
                    return complaint(&format!("{path}: the pool wants paths that begin with '/'"));
                }
                let patience = timeout_us.map_or(self.shared.timeout, Duration::from_micros);
                let stream = self.stream;
                let wanted = || !is_gone(stream);
                let order =
                    ClaimOrder { data, disks, patience: Some(patience), wanted: Some(&wanted) };
                let pool = &self.shared.pool;
                let vm = match &snapshot {
                    Some(path) => pool.restore_snapshot_with(path, &order),
                    None => pool.claim(&order),
                };
                match vm {
                    Ok(vm) => {
                        let claimed = Claimed {
                            id: vm.id().to_string(),
                            control: vm.control_path().to_path_buf(),
                            console: vm.console_path().to_path_buf(),
                            pid: vm.pid(),
                            took_us: micros(begun),
                        };
                        self.vm = Some(vm);
                        Answer::Claim(claimed)
                    }
                    Err(error) => Answer::Error { message: chain(&error), remedy: error.remedy() },
                }
            }
        }
    }
}

/// Whether the client has closed its end.
fn is_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
        && fds[0].revents().is_some_and(|flags| flags.intersects(gone))
}
