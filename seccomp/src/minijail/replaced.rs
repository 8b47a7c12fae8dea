//! Calls that took the place of others in the C library.
//!
//! Policies outlive the library they were written for: it does the same as ever by other calls,
//! which they do not name. Where one allows the old call, whatever its arguments, and says nothing
//! of the new one, it allows that too. What a new call could do beyond that is not given away:
//! clone3, whose flags no filter sees, is refused by `policies/plugin-startup.policy` so that the
//! library falls back.

use super::{Policy, PolicyError};

/// The old call, and rules for what glibc 2.34 and later make in its place on x86_64.
const REPLACED: &[(&str, &str)] = &[
    // nanosleep(), sleep() and usleep(), by the same clock.
    ("nanosleep", "clock_nanosleep: arg0 == 0"),
    ("select", "pselect6: 1"),
    ("pipe", "pipe2: 1"),
    ("eventfd", "eventfd2: 1"),
    ("signalfd", "signalfd4: 1"),
    ("getdents", "getdents64: 1"),
    // A path that is relative is so to where the process is.
    ("open", "openat: arg0 == AT_FDCWD || arg0 == 0xffffff9c"),
    // raise() and abort() ask who they are each time.
    ("tgkill", "getpid: 1\ngettid: 1"),
    // Of the process itself; to read them is part of every start.
    ("setrlimit", "prlimit64: arg0 == 0"),
];

impl Policy {
    /// Allows what has taken the place of calls that the policy allows.
    ///
    /// # Errors
    /// None that could happen.
    pub fn with_replacements(mut self) -> Result<Policy, PolicyError> {
        for (old, rules) in REPLACED {
            let more = Policy::parse("replaced", rules)?;
            let number = crate::syscalls::number(old);
            let always = |of: i64| {
                let rule = self.rules.iter().find(|(call, _)| *call == of);
                rule.is_some_and(|(_, rule)| rule.any.iter().any(Vec::is_empty))
            };
            if number.is_some_and(always) {
                for (call, rule) in more.rules {
                    if !self.rules.iter().any(|(own, _)| *own == call) {
                        self.rules.push((call, rule));
                    }
                }
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::minijail::Action;

    fn rule<'a>(policy: &'a Policy, call: &str) -> Option<&'a crate::minijail::Rule> {
        let number = crate::syscalls::number(call).expect(call);
        policy.rules.iter().find(|(of, _)| *of == number).map(|(_, rule)| rule)
    }

    #[test]
    fn what_was_allowed_is_so_by_its_new_name() {
        let text = "nanosleep: 1\nselect: 1\npselect6: return EPERM\npipe: arg0 != 0\n\
                    eventfd: return EPERM\ntgkill: 1";
        let policy = Policy::parse("p", text).expect(text).with_replacements().expect("rules");
        assert!(rule(&policy, "clock_nanosleep").is_some());
        assert!(rule(&policy, "gettid").is_some() && rule(&policy, "getpid").is_some());
        // What it says itself stays; a condition or a refusal is no permission.
        assert_eq!(rule(&policy, "pselect6").expect("own").otherwise, Action::Errno(1));
        assert!(rule(&policy, "pipe2").is_none());
        assert!(rule(&policy, "eventfd2").is_none());
        assert!(rule(&policy, "openat").is_none());
    }
}
