//! Readiness markers: whole lines of guest output that say how far the guest is.

use crate::protocol::Marker;

pub(super) const LONGEST: usize = "cellblock:heartbeat\r".len();

/// Watches guest output for marker lines. A line ends with a line feed, which a
/// carriage return may precede.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Lines {
    line: [u8; LONGEST],
    /// Bytes of the line so far, also those that did not fit.
    len: usize,
}

impl Lines {
    /// The line so far, as far as it is kept; one that is too long stays too long.
    pub(super) fn save(&self) -> Vec<u8> {
        let mut line = self.line[..self.len.min(LONGEST)].to_vec();
        line.extend((self.len > LONGEST).then_some(0));
        line
    }

    /// Goes on with a line that [`Lines::save`] gave.
    pub(super) fn load(line: &[u8]) -> Lines {
        let mut lines = Lines::default();
        line.iter().filter(|byte| **byte != b'\n').for_each(|byte| {
            let _ = lines.push(*byte); // no line ends here
        });
        lines
    }

    /// The line so far, and its length, which may be beyond it.
    pub(super) fn parts(&self) -> (&[u8; LONGEST], usize) {
        (&self.line, self.len)
    }

    /// What [`Lines::parts`] gave, whatever that was.
    pub(super) fn from_parts(line: [u8; LONGEST], len: usize) -> Lines {
        Lines { line, len }
    }

    /// Takes one byte of output; gives the marker whose line it ends.
    pub(super) fn push(&mut self, byte: u8) -> Option<Marker> {
        if byte != b'\n' {
            if let Some(place) = self.line.get_mut(self.len) {
                *place = byte;
            }
            self.len = self.len.saturating_add(1);
            return None;
        }
        let line = self.line.get(..std::mem::take(&mut self.len))?;
        match line.strip_suffix(b"\r").unwrap_or(line) {
            b"cellblock:heartbeat" => Some(Marker::Heartbeat),
            b"cellblock:pre-exec" => Some(Marker::PreExec),
            b"cellblock:listener" => Some(Marker::Listener),
            b"cellblock:parked" => Some(Marker::Parked),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers(output: &[u8]) -> Vec<Marker> {
        let mut lines = Lines::default();
        output.iter().filter_map(|&byte| lines.push(byte)).collect()
    }

    #[test]
    fn whole_lines_count() {
        assert_eq!(
            markers(
                b"cellblock:heartbeat\ncellblock:pre-exec\r\n\
                  cellblock:listener\ncellblock:parked\ncellblock:heartbeat\r\n"
            ),
            [
                Marker::Heartbeat,
                Marker::PreExec,
                Marker::Listener,
                Marker::Parked,
                Marker::Heartbeat
            ]
        );
    }

    #[test]
    fn anything_else_does_not() {
        for line in [
            &b"cellblock:heartbeat"[..],
            b" cellblock:parked\n",
            b"cellblock:parked \n",
            b"cellblock:parked\r\r\n",
            b"cellblock:listener-gone\n",
            b"cellblock:heartbeat and much more text than a marker has\n",
            b"\n\r\n",
        ] {
            assert_eq!(markers(line), [], "{}", line.escape_ascii());
        }
        // An endless line does not confuse the next one.
        let mut long = vec![b'x'; 100_000];
        long.extend(b"\ncellblock:parked\n");
        assert_eq!(markers(&long), [Marker::Parked]);
    }
}
