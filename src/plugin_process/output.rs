//! A plugin's standard error, logged line by line. It may say anything, at any speed.

use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::remedy::printable;
use crate::throttle::Throttle;

/// What is longer is cut there, and goes on in the next line.
const MAX_LINE: usize = 512;
/// Most that is read before others have their turn.
const ROUND: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Output {
    pipe: PipeReader,
    line: Vec<u8>,
    lines: Throttle,
}

impl Output {
    pub(super) fn new(pipe: PipeReader) -> nix::Result<Output> {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Output { pipe, line: Vec::new(), lines: Throttle::default() })
    }

    /// Logs what is there. False at the end of it.
    pub(super) fn log(&mut self) -> bool {
        let mut buffer = [0; 4096];
        for _ in 0..ROUND / buffer.len() {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.take(&buffer[..count]),
                Err(_) => return true, // nothing there for now
            }
        }
        true
    }

    /// Logs what is left, the last line without an end included.
    pub(super) fn finish(&mut self) {
        self.log();
        if !self.line.is_empty() {
            self.say();
        }
        left_out(self.lines.end());
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
            }
            if *byte == b'\n' || self.line.len() == MAX_LINE {
                self.say();
            }
        }
    }

    fn say(&mut self) {
        match self.lines.take() {
            Some(unsaid) => left_out(unsaid),
            None => {
                self.line.clear();
                return;
            }
        }
        let text = printable(&String::from_utf8_lossy(&self.line));
        self.line.clear();
        tracing::warn!(role = "plugin", "{text}");
    }
}

fn left_out(lines: u64) {
    if lines > 0 {
        tracing::warn!(role = "plugin", "{lines} lines were left out: there were too many");
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
