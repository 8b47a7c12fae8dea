//! What the guest or the user has said that the VMM is to be told, and whether it was.
//!
//! A mark is in the journal, and counts with the access that made it: a process that dies
//! before it has told the VMM leaves that to its successor. One that dies between telling and
//! noting that it did has it told again, under the same number, by which the VMM knows it.

use std::sync::atomic::Ordering;

use cellblock_wire::{Channel, ChannelError};

use super::journal::{Journal, MARKS};
use crate::protocol::{FromCell, Marker};

/// The user wants to quit.
const QUIT: u8 = 0xff;

pub(super) struct Marks {
    journal: Journal,
    /// Marks made so far, and those of them that the VMM was told; numbers that wrap.
    made: u32,
    told: u32,
}

impl Marks {
    /// Goes on where a process before this one was: `made` is what that has committed.
    pub(super) fn new(journal: Journal, made: Option<u32>) -> Marks {
        let told = journal.told().load(Ordering::Acquire) as u32;
        // More than there is room for makes no sense.
        let made = made.filter(|made| made.wrapping_sub(told) <= MARKS as u32).unwrap_or(told);
        Marks { journal, made, told }
    }

    /// For the next commit.
    pub(super) fn made(&self) -> u32 {
        self.made
    }

    /// The guest has said so. One who says it that often has made its point.
    pub(super) fn marker(&mut self, marker: Marker) {
        if self.waiting() < MARKS - 1 {
            self.make(code(marker));
        }
    }

    /// The user has said so, for whom there is room.
    pub(super) fn quit(&mut self) {
        if self.waiting() < MARKS {
            self.make(QUIT);
        }
    }

    fn make(&mut self, code: u8) {
        self.journal.put_mark(self.made, code);
        self.made = self.made.wrapping_add(1);
    }

    fn waiting(&self) -> usize {
        self.made.wrapping_sub(self.told) as usize
    }

    /// Whether the VMM has been told everything.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    /// Tells what is committed, as far as the channel has room. True if that is all.
    pub(super) fn tell(&mut self, cell: &Channel) -> Result<bool, ChannelError> {
        while !self.is_empty() {
            let number = self.told;
            let message = match self.journal.mark(number) {
                QUIT => Some(FromCell::Quit),
                code => marker(code).map(|marker| FromCell::Marker { number, marker }),
            };
            if let Some(message) = message
                && !cell.try_send(&message, &[])?
            {
                return Ok(false);
            }
            self.told = number.wrapping_add(1);
            self.journal.told().store(self.told.into(), Ordering::Release);
        }
        Ok(true)
    }
}

const CODES: [(u8, Marker); 4] =
    [(1, Marker::Heartbeat), (2, Marker::PreExec), (3, Marker::Listener), (5, Marker::Parked)];

/// 0 for one that no line says, which is none.
fn code(marker: Marker) -> u8 {
    CODES.iter().find(|(_, of)| *of == marker).map_or(0, |(code, _)| *code)
}

fn marker(code: u8) -> Option<Marker> {
    CODES.iter().find(|(of, _)| *of == code).map(|(_, marker)| *marker)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::JOURNAL_BYTES;
    use cellblock_wire::sealed_memfd;

    fn journal() -> Journal {
        Journal::map(sealed_memfd("journal", JOURNAL_BYTES as u64).expect("memfd")).expect("map")
    }

    /// What the VMM finds in the channel: numbers, `None` for the user's wish.
    fn heard(cell: &Channel) -> Vec<Option<(u32, Marker)>> {
        std::iter::from_fn(|| match cell.try_recv().expect("channel")?.0 {
            FromCell::Marker { number, marker } => Some(Some((number, marker))),
            FromCell::Quit => Some(None),
            other => panic!("{other:?}"),
        })
        .collect()
    }

    #[test]
    fn what_was_made_and_not_told_is_told_by_the_successor() {
        let (journal, (near, far)) = (journal(), Channel::pair().expect("channel"));
        let mut first = Marks::new(journal.clone(), None);
        first.marker(Marker::Heartbeat);
        assert!(first.tell(&near).expect("tell"));
        [Marker::Listener, Marker::Parked].into_iter().for_each(|marker| first.marker(marker));
        first.quit();
        let committed = first.made();
        first.marker(Marker::PreExec); // and died
        let mut second = Marks::new(journal.clone(), Some(committed));
        assert!(second.tell(&near).expect("tell"));
        let expected = [
            Some((0, Marker::Heartbeat)),
            Some((1, Marker::Listener)),
            Some((2, Marker::Parked)),
            None,
        ];
        assert_eq!(heard(&far), expected);
        // Told, and died before that was noted.
        journal.told().store(2, Ordering::Relaxed);
        let mut third = Marks::new(journal, Some(3));
        assert!(third.tell(&near).expect("tell"));
        assert_eq!(heard(&far), [Some((2, Marker::Parked))]);
    }

    #[test]
    fn too_many_are_left_out_but_the_user_is_heard() {
        let (near, far) = Channel::pair().expect("channel");
        let mut marks = Marks::new(journal(), None);
        (0..2 * MARKS).for_each(|_| marks.marker(Marker::Parked));
        marks.quit();
        assert_eq!(marks.made(), MARKS as u32);
        let mut all = Vec::new();
        while !marks.tell(&near).expect("tell") {
            all.extend(heard(&far));
        }
        all.extend(heard(&far));
        assert_eq!(all.len(), MARKS);
        assert_eq!((all[0], all[MARKS - 1]), (Some((0, Marker::Parked)), None));
    }

    #[test]
    fn a_count_that_makes_no_sense_is_none() {
        let (near, far) = Channel::pair().expect("channel");
        let mut marks = Marks::new(journal(), Some(MARKS as u32 + 1));
        assert!(marks.is_empty());
        // Nor is a mark that nobody makes.
        marks.make(77);
        assert!(marks.tell(&near).expect("tell"));
        assert_eq!(heard(&far), []);
    }
}
