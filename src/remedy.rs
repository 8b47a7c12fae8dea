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
/// Errors of some crates repeat their cause; the line says it once.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            // Writing to a string cannot fail.
            let _ = write!(line, ": {text}");
        }
        source = cause.source();
    }
    printable(&line)
}

/// [`chain`] and the remedy: for people.
pub fn one_line(error: &impl Remedy) -> String {
    let line = chain(error);
    match error.remedy() {
        Some(remedy) => format!("{line}; {}", printable(&remedy)),
        None => line,
    }
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
    fn a_cause_that_is_repeated_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("no way in: {0}")]
        struct Repeats(#[source] Inner);
        assert_eq!(chain(&Repeats(Inner)), "no way in: key lost");
    }

    #[test]
    fn terminal_sequences_are_spelt_out() {
        assert_eq!(printable("a\x1b[2Jb\r\u{202e}"), "a\\u{1b}[2Jb\\r\\u{202e}");
    }
}
