//! Where the guest's console goes.

use std::path::PathBuf;
use std::str::FromStr;

use super::{SpecError, fields};

/// A serial SPEC: the endpoint of the guest's COM1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialSpec {
    /// This process's standard output; input from its standard input.
    #[default]
    Stdout,
    /// Output to a file, created or emptied; no input.
    File(PathBuf),
    /// A new pseudo-terminal; its name is printed.
    Pty,
    /// A new Unix stream socket, one client at a time.
    Socket(PathBuf),
    /// Output is discarded; no input.
    Null,
}

impl FromStr for SerialSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let parts = fields::split(spec);
        let (first, rest) = parts.split_first().ok_or(SpecError::NoPath)?;
        let (kind, path) = match first.split_once('=') {
            Some((kind, path)) => (kind, Some(path)),
            None => (first.as_str(), None),
        };
        let with_path = |hint| match path {
            Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
            _ => Err(SpecError::NoValue { key: kind.to_owned(), hint }),
        };
        let endpoint = match kind {
            "file" => SerialSpec::File(with_path("FILE")?),
            "socket" => SerialSpec::Socket(with_path("PATH")?),
            "stdout" | "pty" | "null" if path.is_some() => {
                return Err(SpecError::BadValue {
                    key: kind.to_owned(),
                    value: path.unwrap_or_default().to_owned(),
                    why: "it takes no value".into(),
                });
            }
            "stdout" => SerialSpec::Stdout,
            "pty" => SerialSpec::Pty,
            "null" => SerialSpec::Null,
            other => return Err(SpecError::UnknownEndpoint(other.to_owned())),
        };
        if let Some(extra) = rest.first() {
            let key = extra.split_once('=').map_or(extra.as_str(), |(key, _)| key);
            return Err(SpecError::UnknownKey {
                key: key.to_owned(),
                known: "none for a serial line (a comma inside a path is written twice)".into(),
            });
        }
        Ok(endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for (spec, endpoint) in [
            ("stdout", SerialSpec::Stdout),
            ("pty", SerialSpec::Pty),
            ("null", SerialSpec::Null),
            ("file=a/b", SerialSpec::File("a/b".into())),
            ("file=a,,b", SerialSpec::File("a,b".into())),
            ("socket=/run/s", SerialSpec::Socket("/run/s".into())),
        ] {
            assert_eq!(spec.parse(), Ok(endpoint), "{spec}");
        }
    }

    #[test]
    fn wrong_ones_are_named() {
        for (spec, part) in [
            ("", "unknown serial endpoint ''"),
            ("tty", "unknown serial endpoint 'tty'"),
            ("file", "'file' needs a value: file=FILE"),
            ("file=", "'file' needs a value"),
            ("socket", "socket=PATH"),
            ("pty=x", "takes no value"),
            ("null,color=red", "unknown key 'color'"),
        ] {
            let line = spec.parse::<SerialSpec>().unwrap_err().to_string();
            assert!(line.contains(part), "{spec}: {line}");
        }
    }
}
