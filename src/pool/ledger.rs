//! The pool's books: how many shells there are, in what state, and what became of every claim.
//!
//! ```text
//!            make            grant             release
//!  nothing ───────▶ idle ───────────▶ live ───────────────▶ nothing, or idle again (reset)
//!                    │  dies, or is one too many
//!                    └────────────▶ ending ───────────────▶ nothing
//! ```
//! A VM counts as live until it is destroyed: the cap holds for what exists, not for what somebody
//! still wants. Every change goes through [`Ledger::apply`], which checks that the books balance
//! ([`Ledger::check`]); a pool whose books do not says so, in its statistics and in the log.

/// What a pool may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Idle shells kept ready.
    pub min_size: usize,
    /// Most idle shells.
    pub max_size: usize,
    /// Most VMs that are in somebody's hands.
    pub max_live: usize,
    /// Bytes that all shells and VMs together may come to.
    pub memory: u64,
    /// Bytes that each of them is counted as.
    pub charge: u64,
}

/// A limit that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum LimitsError {
    #[error("a pool of at most 0 idle shells is none: give a max_size of 1 or more")]
    NoSize,
    #[error("min_size is {min} and max_size {max}: a pool cannot keep more than its most")]
    Order { min: usize, max: usize },
    #[error("at most 0 live VMs is none: give a max_live of 1 or more")]
    NoLive,
    #[error(
        "one VM counts as {charge} MiB, and all together may have {memory} MiB: give more memory"
    )]
    Memory { charge: u64, memory: u64 },
}

impl Limits {
    /// Refuses what no pool can be run by.
    pub fn check(&self) -> Result<(), LimitsError> {
        let mib = |bytes: u64| bytes >> 20;
        if self.max_size == 0 {
            return Err(LimitsError::NoSize);
        }
        if self.min_size > self.max_size {
            return Err(LimitsError::Order { min: self.min_size, max: self.max_size });
        }
        if self.max_live == 0 {
            return Err(LimitsError::NoLive);
        }
        if self.charge > self.memory {
            let (charge, memory) = (mib(self.charge), mib(self.memory));
            return Err(LimitsError::Memory { charge, memory });
        }
        Ok(())
    }
}

/// Something that happens to a shell or a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A shell is begun.
    MakeStarted,
    /// It is there, and idle.
    Made,
    /// It could not be made.
    MakeFailed,
    /// An idle shell turned out dead.
    Lost,
    /// An idle shell is one too many.
    Discarded,
    /// A shell that was lost or discarded is gone.
    Destroyed,
    /// Somebody wants a VM.
    Claimed,
    /// They want another, after one that was dead; it is the same claim.
    Retried,
    /// They get an idle shell; it was there when they came.
    Hit,
    /// They get a shell that they had to wait for.
    Miss,
    /// They do not wait any longer.
    TimedOut,
    /// They are gone.
    Abandoned,
    /// They get an error: a shell could not be made, or the pool takes no claims any more.
    Refused,
    /// A shell that was handed out did not become a VM.
    RestoreFailed,
    /// A VM is given back.
    Released,
    /// It is gone.
    Returned,
    /// It was reset, and is idle.
    Reset,
    /// It could not be reset, and is still to be destroyed.
    ResetFailed,
}

/// Counts, each as of now or since the pool was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // named after the changes that count there
pub struct Ledger {
    // Now.
    pub making: usize,
    pub idle: usize,
    pub live: usize,
    /// Of those that are live: given back, and not yet gone.
    pub releasing: usize,
    pub ending: usize,
    pub waiting: usize,
    // Since the beginning.
    pub started: u64,
    pub made: u64,
    pub make_failures: u64,
    pub lost: u64,
    pub discarded: u64,
    pub destroyed: u64,
    pub claims: u64,
    pub retries: u64,
    pub hits: u64,
    pub misses: u64,
    pub timeouts: u64,
    pub abandoned: u64,
    pub refused: u64,
    pub restore_failures: u64,
    pub returned: u64,
    pub resets: u64,
    pub reset_failures: u64,
}

/// One of the counts of what is there now.
type Place = fn(&mut Ledger) -> &mut usize;

impl Ledger {
    /// Books `change`. False where it cannot be: there is nothing for it to happen to.
    #[must_use]
    pub fn apply(&mut self, change: Change) -> bool {
        let (from, to): (Option<Place>, Option<Place>) = match change {
            Change::MakeStarted => (None, Some(|l| &mut l.making)),
            Change::Made => (Some(|l| &mut l.making), Some(|l| &mut l.idle)),
            Change::MakeFailed => (Some(|l| &mut l.making), None),
            Change::Lost | Change::Discarded => (Some(|l| &mut l.idle), Some(|l| &mut l.ending)),
            Change::Destroyed => (Some(|l| &mut l.ending), None),
            Change::Claimed | Change::Retried => (None, Some(|l| &mut l.waiting)),
            Change::Hit | Change::Miss => (Some(|l| &mut l.idle), Some(|l| &mut l.live)),
            Change::TimedOut | Change::Abandoned | Change::Refused => {
                (Some(|l| &mut l.waiting), None)
            }
            Change::Released => (None, Some(|l| &mut l.releasing)),
            Change::Returned => (Some(|l| &mut l.releasing), None),
            Change::Reset => (Some(|l| &mut l.releasing), Some(|l| &mut l.idle)),
            Change::RestoreFailed | Change::ResetFailed => (None, None),
        };
        if let Some(from) = from {
            let Some(left) = from(self).checked_sub(1) else { return false };
            *from(self) = left;
        }
        if let Some(to) = to {
            *to(self) += 1;
        }
        // Some of them move two things.
        let second = match change {
            Change::Hit | Change::Miss => &mut self.waiting,
            Change::Returned | Change::Reset => &mut self.live,
            _ => return self.count(change),
        };
        let Some(left) = second.checked_sub(1) else { return false };
        *second = left;
        self.count(change)
    }

    fn count(&mut self, change: Change) -> bool {
        *match change {
            Change::MakeStarted => &mut self.started,
            Change::Made => &mut self.made,
            Change::MakeFailed => &mut self.make_failures,
            Change::Lost => &mut self.lost,
            Change::Discarded => &mut self.discarded,
            Change::Destroyed => &mut self.destroyed,
            Change::Claimed => &mut self.claims,
            Change::Retried => &mut self.retries,
            Change::Hit => &mut self.hits,
            Change::Miss => &mut self.misses,
            Change::TimedOut => &mut self.timeouts,
            Change::Abandoned => &mut self.abandoned,
            Change::Refused => &mut self.refused,
            Change::RestoreFailed => &mut self.restore_failures,
            Change::Released => return true,
            Change::Returned => &mut self.returned,
            Change::Reset => &mut self.resets,
            Change::ResetFailed => &mut self.reset_failures,
        } += 1;
        true
    }

    /// Shells and VMs that exist, or are about to.
    pub fn existing(&self) -> usize {
        self.making + self.idle + self.live + self.ending
    }

    /// Whether there may be one more.
    pub fn admits(&self, limits: &Limits) -> bool {
        let next = self.existing() as u64 + 1;
        next.checked_mul(limits.charge).is_some_and(|bytes| bytes <= limits.memory)
    }

    /// Claims that could be served at once if there were shells.
    pub fn servable(&self, limits: &Limits) -> usize {
        self.waiting.min(limits.max_live.saturating_sub(self.live))
    }

    /// What is wrong with the books, if anything. `settled`: everything that can be done at
    /// once has been done.
    pub fn check(&self, limits: &Limits, settled: bool) -> Result<(), String> {
        let n = |count: usize| count as u64;
        let equal = |what: &str, left: u64, right: u64| match left == right {
            true => Ok(()),
            false => Err(format!("{what}: {left} is not {right}")),
        };
        equal("shells begun", self.started, self.made + self.make_failures + n(self.making))?;
        let there = n(self.idle + self.live + self.ending);
        equal("shells made", self.made, there + self.destroyed + self.returned)?;
        let granted = self.hits + self.misses;
        equal("grants", granted, n(self.live) + self.returned + self.resets)?;
        let answered = granted + self.timeouts + self.abandoned + self.refused;
        equal("claims", self.claims + self.retries, n(self.waiting) + answered)?;
        equal("shells given up", self.lost + self.discarded, n(self.ending) + self.destroyed)?;
        let most = |what: &str, value: usize, most: usize| match value <= most {
            true => Ok(()),
            false => Err(format!("{what}: {value} are more than {most}")),
        };
        most("live VMs", self.live, limits.max_live)?;
        most("VMs given back", self.releasing, self.live)?;
        let bytes = n(self.existing()).saturating_mul(limits.charge);
        if bytes > limits.memory {
            return Err(format!("memory: {bytes} bytes are more than {}", limits.memory));
        }
        if settled {
            most("idle shells", self.idle, limits.max_size)?;
            if self.idle > 0 && self.servable(limits) > 0 {
                let (waiting, idle) = (self.waiting, self.idle);
                return Err(format!("{waiting} claims wait beside {idle} idle shells"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { min_size: 1, max_size: 2, max_live: 2, memory: 40, charge: 10 };

    #[test]
    fn limits_that_no_pool_can_have_are_refused() {
        let refused = |limits: Limits| limits.check().unwrap_err().to_string();
        assert!(refused(Limits { max_size: 0, min_size: 0, ..LIMITS }).contains("max_size of 1"));
        assert!(refused(Limits { min_size: 3, ..LIMITS }).contains("min_size is 3"));
        assert!(refused(Limits { max_live: 0, ..LIMITS }).contains("max_live of 1"));
        assert!(refused(Limits { charge: 41, ..LIMITS }).contains("more memory"));
        LIMITS.check().expect("possible");
    }

    #[test]
    fn what_cannot_have_happened_is_not_booked() {
        for change in [
            Change::Made,
            Change::MakeFailed,
            Change::Lost,
            Change::Destroyed,
            Change::Hit,
            Change::TimedOut,
            Change::Returned,
            Change::Reset,
        ] {
            assert!(!Ledger::default().apply(change), "{change:?}");
        }
    }

    #[test]
    fn one_more_is_admitted_as_long_as_memory_lasts() {
        let mut books = Ledger::default();
        for _ in 0..4 {
            assert!(books.admits(&LIMITS));
            assert!(books.apply(Change::MakeStarted));
        }
        assert!(!books.admits(&LIMITS));
        books.check(&LIMITS, true).expect("as much as there may be");
        assert!(books.apply(Change::MakeStarted));
        assert!(books.check(&LIMITS, true).unwrap_err().contains("memory"));
    }

    /// Every kind of wrong book is seen.
    #[test]
    fn books_that_do_not_balance_are_noticed() {
        let mut good = Ledger::default();
        for change in [Change::MakeStarted, Change::Made, Change::Claimed, Change::Hit] {
            assert!(good.apply(change));
            good.check(&LIMITS, false).expect("balanced");
        }
        good.check(&LIMITS, true).expect("balanced");
        let wrong: [fn(&mut Ledger); 8] = [
            |l| l.started += 1,
            |l| l.idle += 1,
            |l| l.hits += 1,
            |l| l.claims += 1,
            |l| l.lost += 1,
            |l| (l.live, l.made, l.started, l.hits, l.claims) = (3, 3, 3, 3, 3),
            |l| l.releasing = 2,
            |l| (l.idle, l.waiting, l.made, l.started, l.claims) = (1, 1, 2, 2, 2),
        ];
        for (n, spoil) in wrong.iter().enumerate() {
            let mut books = good;
            spoil(&mut books);
            assert!(books.check(&LIMITS, true).is_err(), "{n}: {books:?}");
        }
    }
}
