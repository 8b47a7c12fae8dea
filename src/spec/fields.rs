//! Splitting a SPEC into its first part and its keys.

use super::SpecError;

/// One `key[=value]` of a SPEC.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) key: String,
    value: Option<String>,
}

impl Field {
    /// The value, or an error that shows what one looks like.
    pub(super) fn value(&self, hint: &'static str) -> Result<&str, SpecError> {
        match self.value.as_deref() {
            Some(v) if !v.is_empty() => Ok(v),
            _ => Err(SpecError::NoValue { key: self.key.clone(), hint }),
        }
    }

    /// The value as written, if one was.
    pub(super) fn text(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// A switch: the bare key or `=true` is on, `=false` is off.
    pub(super) fn switch(&self) -> Result<bool, SpecError> {
        match self.value.as_deref() {
            None | Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(_) => Err(self.bad("it is true or false")),
        }
    }

    /// The error for a value this key does not take.
    pub(super) fn bad(&self, why: impl Into<String>) -> SpecError {
        SpecError::BadValue {
            key: self.key.clone(),
            value: self.value.clone().unwrap_or_default(),
            why: why.into(),
        }
    }
}

/// Splits at single commas; a doubled one stands for itself.
pub(crate) fn split(spec: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = spec.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

/// Reads the parts after the first as keys out of `known`, each at most once.
pub(super) fn fields(parts: &[String], known: &[&str]) -> Result<Vec<Field>, SpecError> {
    let mut found: Vec<Field> = Vec::new();
    for part in parts {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (part.as_str(), None),
        };
        if !known.contains(&key) {
            return Err(SpecError::UnknownKey { key: key.to_owned(), known: known.join(", ") });
        }
        if found.iter().any(|f| f.key == key) {
            return Err(SpecError::Twice(key.to_owned()));
        }
        found.push(Field { key: key.to_owned(), value });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_split_and_doubled_ones_stay() {
        assert_eq!(split("a,b=c"), ["a", "b=c"]);
        assert_eq!(split("a,,b,c"), ["a,b", "c"]);
        assert_eq!(split("a,,,c"), ["a,", "c"]);
        assert_eq!(split(""), [""]);
        assert_eq!(split("a,"), ["a", ""]);
    }

    #[test]
    fn switches_are_bare_or_spelt_out() {
        let parse = |s: &str| fields(&[s.to_owned()], &["ro"]).unwrap().remove(0).switch();
        assert_eq!(parse("ro"), Ok(true));
        assert_eq!(parse("ro=true"), Ok(true));
        assert_eq!(parse("ro=false"), Ok(false));
        assert!(matches!(parse("ro=1"), Err(SpecError::BadValue { .. })));
    }
}
