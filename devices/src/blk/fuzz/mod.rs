//! What the fuzz targets in `fuzz/` drive; the unit tests replay their corpus.
//!
//! An input is a program for a hostile driver and front end: bytes that choose
//! steps, which write descriptors, headers and indices into a small guest memory
//! and have them served. Any bytes are a program, and a short one does much.

mod guest;
mod messages;
mod record;
mod requests;

pub use messages::messages;
pub use requests::requests;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use cellblock_wire::sealed_memfd;

use crate::protocol::BlkStart;

/// Bytes of the image: 64 sectors.
const IMAGE: u64 = 64 * 512;

/// How often each thing worth telling happened, by name: what shows that a corpus
/// still reaches what it once reached.
pub type Outcome = BTreeMap<&'static str, u64>;

/// The bytes not used yet. Ends a program by running out.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }
}

/// An image with some data in front of a hole. A sealed memfd cannot grow, so its
/// size shows nothing; this one can.
fn image() -> OwnedFd {
    let fd = nix::sys::memfd::memfd_create(c"image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .expect("memfd");
    nix::unistd::ftruncate(&fd, IMAGE as i64).expect("size");
    let content: Vec<u8> = (0..IMAGE / 2).map(|i| (i / 512) as u8 ^ i as u8).collect();
    nix::sys::uio::pwrite(&fd, &content, 0).expect("fill");
    fd
}

/// Whatever was asked for, the image is as long as it was.
fn check_image(image: &File) {
    assert_eq!(image.metadata().expect("metadata").len(), IMAGE, "the image's size");
}

fn start(read_only: bool, queues: u16) -> BlkStart {
    BlkStart {
        read_only,
        size: IMAGE,
        serial: "fuzzed".into(),
        queues,
        poll_us: 0,
        throttle: Default::default(),
        engine: Default::default(),
        failed: false,
        cow: false,
    }
}

fn ram() -> File {
    File::from(sealed_memfd("guest", guest::BYTES).expect("memfd"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Runs every file of a corpus; what happened in all.
    fn replay(name: &str, target: fn(&[u8]) -> Outcome) -> Outcome {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
        let mut sum = Outcome::new();
        for entry in std::fs::read_dir(corpus).expect("corpus") {
            let input = std::fs::read(entry.expect("entry").path()).expect("input");
            for (what, times) in target(&input) {
                *sum.entry(what).or_default() += times;
            }
        }
        sum
    }

    fn names(outcome: &Outcome) -> Vec<&str> {
        outcome.keys().copied().collect()
    }

    #[test]
    fn the_corpus_of_requests_reaches_every_end() {
        let outcome = replay("requests", requests);
        assert_eq!(names(&outcome), requests::NAMES, "{outcome:?}");
    }

    #[test]
    fn the_corpus_of_messages_reaches_every_end() {
        let outcome = replay("messages", messages);
        assert_eq!(names(&outcome), messages::NAMES, "{outcome:?}");
    }
}
