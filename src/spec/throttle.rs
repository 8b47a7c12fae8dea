//! How much a disk may do, as the user says it: `bw=`, `bw-burst=`, `iops=`, `iops-burst=`.

use cellblock_devices::protocol::{Rate, ThrottleLimits};

use super::size::size;

/// The keys, in the order of the documentation.
pub const KEYS: [&str; 4] = ["bw", "bw-burst", "iops", "iops-burst"];

/// Limits a user gave; what was not given stays as it is. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttle {
    /// Bytes a second.
    pub bw: Option<u64>,
    /// Bytes that may go at once.
    pub bw_burst: Option<u64>,
    /// Requests a second.
    pub iops: Option<u64>,
    /// Requests that may go at once.
    pub iops_burst: Option<u64>,
}

impl Throttle {
    /// Reads the value of one of the keys `bw`, `bw-burst`, `iops` and `iops-burst`; says what such a value looks like.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let count = || {
            let digits = value.bytes().all(|b| b.is_ascii_digit());
            value
                .parse::<u64>()
                .ok()
                .filter(|_| digits)
                .ok_or_else(|| "it is a number of requests".to_string())
        };
        let to = match key {
            "bw" => (&mut self.bw, size(value)?),
            "bw-burst" => (&mut self.bw_burst, size(value)?),
            "iops" => (&mut self.iops, count()?),
            "iops-burst" => (&mut self.iops_burst, count()?),
            _ => return Err(format!("the keys are {}", KEYS.join(", "))),
        };
        *to.0 = Some(to.1);
        Ok(())
    }

    /// The limits that follow for a disk that has `now`. A new rate without a burst has
    /// one second's worth of it.
    pub fn applied_to(&self, now: &ThrottleLimits) -> Result<ThrottleLimits, String> {
        Ok(ThrottleLimits {
            bytes: rate("bw", self.bw, self.bw_burst, now.bytes)?,
            requests: rate("iops", self.iops, self.iops_burst, now.requests)?,
        })
    }
}

fn rate(
    key: &str,
    per_second: Option<u64>,
    burst: Option<u64>,
    now: Option<Rate>,
) -> Result<Option<Rate>, String> {
    let per_second = match (per_second, burst) {
        (None, None) => return Ok(now),
        (Some(per_second), _) => per_second,
        (None, Some(_)) => now.map_or(0, |now| now.per_second),
    };
    match (per_second, burst) {
        (0, None) => Ok(None),
        (0, Some(_)) => Err(format!("{key}-burst needs a rate: give {key} too")),
        (_, Some(burst)) if burst < per_second => {
            Err(format!("{key}-burst is {burst}, and has to be at least {key}, {per_second}"))
        }
        (_, burst) => Ok(Some(Rate { per_second, burst: burst.unwrap_or(per_second) })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> Throttle {
        let mut throttle = Throttle::default();
        for (key, value) in pairs {
            throttle.set(key, value).unwrap();
        }
        throttle
    }

    fn limit(per_second: u64, burst: u64) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    #[test]
    fn what_is_given_changes_and_the_rest_stays() {
        let none = ThrottleLimits::default();
        let first = given(&[("bw", "100M"), ("iops", "5000")]).applied_to(&none).unwrap();
        assert_eq!(first.bytes, limit(100 << 20, 100 << 20));
        assert_eq!(first.requests, limit(5000, 5000));
        let second = given(&[("iops-burst", "6000")]).applied_to(&first).unwrap();
        assert_eq!(second, ThrottleLimits { requests: limit(5000, 6000), ..first });
        let third = given(&[("bw", "0"), ("iops", "7")]).applied_to(&second).unwrap();
        assert_eq!(third, ThrottleLimits { bytes: None, requests: limit(7, 7) });
        assert_eq!(Throttle::default().applied_to(&third), Ok(third));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let none = ThrottleLimits::default();
        for (pairs, part) in [
            (&[("bw-burst", "1M")][..], "bw-burst needs a rate"),
            (&[("iops", "0"), ("iops-burst", "9")], "iops-burst needs a rate"),
            (&[("iops", "10"), ("iops-burst", "9")], "iops-burst is 9, and has to be at least"),
        ] {
            let error = given(pairs).applied_to(&none).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let mut throttle = Throttle::default();
        for (key, value, part) in [
            ("bw", "fast", "not a size"),
            ("iops", "5K", "number of requests"),
            ("iops", "+5", "number of requests"),
            ("iops", "", "number of requests"),
            ("ops", "5", "the keys are bw,"),
        ] {
            assert!(throttle.set(key, value).unwrap_err().contains(part), "{key}={value}");
        }
        assert_eq!(throttle, Throttle::default());
    }
}
