//! The lines of a pool's socket: JSON, one request and one answer each.
//!
//! The shapes are stable: fields are added, never renamed, removed or given another meaning;
//! readers ignore what they do not know. Times are microseconds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pool::stats::PoolStats;

/// Most bytes of a line.
pub const MAX_LINE: usize = 64 << 10;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A VM, for as long as this connection lives.
    Claim {
        /// For the guest's metadata: text, or any bytes as hexadecimal digits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[allow(missing_docs)]
        data_hex: Option<String>,
        /// Disks that are to be others: as `restore --disk`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        disks: Vec<String>,
        /// The snapshot, of a pool that is not primed with one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<PathBuf>,
        /// How long to wait for it; what the pool says where not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_us: Option<u64>,
    },
    /// Give the VM of this connection back.
    Release,
    /// How the pool is.
    Stats,
    /// Take no more claims, end idle shells, and end the service with the last VM.
    Drain,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Answer {
    /// The guest runs.
    Claim(Claimed),
    /// The VM is given back.
    Release,
    /// How the pool is.
    Stats(Box<PoolStats>),
    /// Idle shells are gone.
    Drain {
        /// VMs that somebody still has.
        in_use: u64,
    },
    /// Not an answer: the VM of this connection has ended by itself.
    Ended,
    /// It was not done.
    Error {
        /// One line: what went wrong.
        message: String,
        /// What to do about it, if anything.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        remedy: Option<String>,
    },
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimed {
    /// Its id, which its guest has in its metadata.
    pub id: String,
    /// Its control socket.
    pub control: PathBuf,
    /// Its console's socket.
    pub console: PathBuf,
    /// The VMM's process id.
    pub pid: u32,
    /// From the request until its guest ran, in microseconds.
    pub took_us: u64,
}

/// A value as a line.
pub fn line<T: Serialize>(value: &T) -> Vec<u8> {
    // Nothing here can fail to be JSON but a path that is no text, which is told as such.
    let mut line = serde_json::to_vec(value).unwrap_or_else(|error| {
        let why = format!("the answer cannot be put into words: {error}");
        format!("{{\"reply\":\"error\",\"message\":{why:?}}}").into_bytes()
    });
    line.push(b'\n');
    line
}

/// Bytes from hexadecimal digits.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8; 2]| Some((digit(pair[0])? << 4 | digit(pair[1])?) as u8);
    rest.is_empty().then(|| pairs.iter().map(byte).collect())?
}

/// Hexadecimal digits of bytes.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_they_are_documented_to_be() {
        let asked: Request = serde_json::from_str(r#"{"request":"claim","data":"x"}"#).unwrap();
        let (data, snapshot) = (Some("x".to_string()), None);
        let wanted =
            Request::Claim { data, data_hex: None, disks: vec![], snapshot, timeout_us: None };
        assert_eq!(asked, wanted);
        assert_eq!(line(&Request::Stats), b"{\"request\":\"stats\"}\n");
        assert!(serde_json::from_str::<Request>(r#"{"request":"claim","dats":"x"}"#).is_err());
        let text = line(&Answer::Drain { in_use: 2 });
        assert_eq!(text, b"{\"reply\":\"drain\",\"in_use\":2}\n");
    }

    #[test]
    fn hexadecimal_digits_go_both_ways() {
        assert_eq!(from_hex(&to_hex(b"\0\xff7")), Some(b"\0\xff7".to_vec()));
        assert_eq!(from_hex(""), Some(vec![]));
        assert_eq!((from_hex("0"), from_hex("0g")), (None, None));
    }
}
