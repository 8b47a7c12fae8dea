//! Medians and spread.

use std::fmt;

/// Sorted values of one row.
pub struct Sample(Vec<f64>);

impl Sample {
    /// Takes values in any order.
    pub fn new(mut values: Vec<f64>) -> Sample {
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Sample(values)
    }

    fn at(&self, part: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * part).round() as usize]
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, low, high, p99] = [0.5, 0.1, 0.9, 0.99].map(|part| self.at(part));
        let digits = if median < 100.0 { 2 } else { 0 };
        write!(f, "median {median:.digits$}  (10%..90%: {low:.digits$}..{high:.digits$}")?;
        if self.0.len() >= 100 {
            write!(f, ", 99%: {p99:.digits$}")?;
        }
        f.write_str(")")
    }
}
