//! Errors that know what the user can do about them.
//!
//! `Display` of an error says what was being done; its source says why it
//! failed; the remedy says what to do. One line for a person holds all three.

use std::error::Error;
use std::fmt::Write as _;

/// An error that may know a remedy.
pub trait Remedy: Error {
    /// What the user can do, as an imperative clause; none where there is nothing to say.
    fn remedy(&self) -> Option<String> {
        None
    }
}

/// The whole chain of `error` joined by `": "`, as one printable line: for logs.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        let _ = write!(line, ": {cause}");
        source = cause.source();
    }
    printable(&line)
}

/// The whole chain of `error` joined by `": "`, then its remedy, as one printable line.
pub fn one_line(error: &dyn Remedy) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Writing to a string cannot fail.
        let _ = write!(line, ": {cause}");
        source = cause.source();
    }
    if let Some(remedy) = error.remedy() {
        line.push_str("; ");
        line.push_str(&remedy);
    }
    printable(&line)
}

/// `text` with every control character escaped, so that it stays on one line and
/// cannot drive the terminal it is shown on. Device processes and other VMs' sockets
/// are not trusted with somebody's terminal.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push(' '),
            c if c.is_control() || is_direction_override(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Characters that reorder the text around them.
fn is_direction_override(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("opening the door")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("key\nlost")]
    struct Inner;

    impl Remedy for Outer {
        fn remedy(&self) -> Option<String> {
            Some("find the key".into())
        }
    }

    #[test]
    fn chain_and_remedy_make_one_line() {
        assert_eq!(one_line(&Outer(Inner)), "opening the door: key lost; find the key");
    }

    #[test]
    fn terminal_sequences_are_spelt_out() {
        assert_eq!(printable("a\x1b[2Jb\r\u{202e}"), "a\\u{1b}[2Jb\\r\\u{202e}");
    }
}
