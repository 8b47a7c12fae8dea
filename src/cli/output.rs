//! Writing to standard output, where a reader may leave at any time.

use std::io::{self, IsTerminal, Write};

use super::Failure;
use crate::remedy::printable;

/// Writes `text` as it is.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Unread),
        Err(e) => Err(Failure::Error(format!("writing to standard output: {e}"))),
    }
}

/// Writes one line.
pub(super) fn print_line(line: &str) -> Result<(), Failure> {
    print(&format!("{line}\n"))
}

/// How far a long operation is: on standard error, and only if that is a terminal.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    shown: Option<u64>,
    terminal: bool,
}

impl Progress {
    pub(super) fn new(what: &'static str) -> Progress {
        Progress { what, shown: None, terminal: io::stderr().is_terminal() }
    }

    /// Shows whole percents, each once.
    pub(super) fn show(&mut self, done: u64, total: u64) {
        let percent = (u128::from(done) * 100 / u128::from(total.max(1))) as u64;
        if self.terminal && self.shown != Some(percent) {
            self.shown = Some(percent);
            let filled = percent as usize * 40 / 100;
            // Nobody misses it if it cannot be shown.
            let _ =
                write!(io::stderr(), "\r{} [{:<40}] {percent:3}%", self.what, "#".repeat(filled));
        }
    }

    /// Takes it away again.
    pub(super) fn end(&mut self) {
        if self.shown.take().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Rows under a heading, columns aligned; those of numbers to the right.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(heading: &[&str]) -> Table {
        Table { rows: vec![heading.iter().map(|h| (*h).to_owned()).collect()] }
    }

    /// Adds a row. Cells may hold text from elsewhere: it is made printable.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// All rows as lines.
    pub(super) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|c| self.rows.iter().map(|r| cell(r, c).chars().count()).max().unwrap_or(0))
            .collect();
        let numeric: Vec<bool> = (0..columns)
            .map(|c| {
                self.rows.len() > 1
                    && self.rows[1..].iter().all(|r| {
                        let text = cell(r, c);
                        text == "-" || text.starts_with(|first: char| first.is_ascii_digit())
                    })
            })
            .collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for column in 0..columns {
                let (text, width) = (cell(row, column), widths[column]);
                let text = match numeric[column] {
                    true => format!("{text:>width$}"),
                    false => format!("{text:<width$}"),
                };
                line.push_str(&text);
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["ID", "PID", "WHAT"]);
        table.row(vec!["disk0".into(), "7".into(), "x\x1b".into()]);
        table.row(vec!["a".into(), "1234".into(), "y".into()]);
        assert_eq!(table.render(), "ID      PID  WHAT\ndisk0     7  x\\u{1b}\na      1234  y\n");
    }
}
