//! Times with their unit.

use std::time::Duration;

/// Reads a time: seconds or milliseconds, with their unit.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, scale) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1000),
        (None, None) => return Err("it is a number with its unit, 500ms or 5s".into()),
    };
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)) {
        Some(ms @ 1..=600_000) => Ok(Duration::from_millis(ms)),
        _ => Err("it is 1ms to 600s".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_limits() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("5s"), Ok(Duration::from_secs(5)));
        for text in ["5", "0s", "-1s", "601s", "ms", "", "99999999999999999999s"] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}
