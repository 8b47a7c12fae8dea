//! Where outside programs attach to a VM, and what they may do.

use std::path::PathBuf;
use std::str::FromStr;

use cellblock_plugin_api::MemoryAccess;

use super::{SpecError, fields};

/// A plugin-socket SPEC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginSocketSpec {
    /// Where the socket is made.
    pub path: PathBuf,
    /// Users that may look, besides this one, which may do everything.
    pub observe: Vec<u32>,
    /// Users that may do everything.
    pub control: Vec<u32>,
    /// How guest memory is handed out.
    pub memory: MemoryAccess,
}

impl PluginSocketSpec {
    /// With its path from the root on, for whoever is told of it in another directory.
    pub fn absolute(mut self) -> PluginSocketSpec {
        if let Ok(path) = std::path::absolute(&self.path) {
            self.path = path;
        }
        self
    }
}

impl FromStr for PluginSocketSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let parts = fields::split(spec);
        let (path, rest) = parts.split_first().ok_or(SpecError::NoPath)?;
        if path.is_empty() {
            return Err(SpecError::NoPath);
        }
        let mut made = PluginSocketSpec {
            path: path.into(),
            observe: Vec::new(),
            control: Vec::new(),
            memory: MemoryAccess::ReadOnly,
        };
        for field in fields::fields(rest, &["observe", "control", "memory"])? {
            let users = || {
                let text = field.value("UID or UID:UID")?;
                let users = text.split(':').map(str::parse);
                users
                    .collect::<Result<Vec<u32>, _>>()
                    .map_err(|_| field.bad("it is a user id, or several with : between"))
            };
            match field.key.as_str() {
                "observe" => made.observe = users()?,
                "control" => made.control = users()?,
                _ => {
                    made.memory = match field.value("none, ro or rw")? {
                        "none" => MemoryAccess::None,
                        "ro" => MemoryAccess::ReadOnly,
                        "rw" => MemoryAccess::ReadWrite,
                        _ => return Err(field.bad("it is none, ro or rw")),
                    }
                }
            }
        }
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_defaults() {
        let plain: PluginSocketSpec = "/run/p".parse().unwrap();
        assert_eq!((plain.path.to_str(), plain.memory), (Some("/run/p"), MemoryAccess::ReadOnly));
        assert!(plain.observe.is_empty() && plain.control.is_empty());
        let full: PluginSocketSpec = "p,,q,observe=7:8,control=9,memory=rw".parse().unwrap();
        assert_eq!(full.path.to_str(), Some("p,q"));
        assert_eq!((full.observe, full.control), (vec![7, 8], vec![9]));
        assert_eq!(full.memory, MemoryAccess::ReadWrite);
    }

    #[test]
    fn wrong_ones_are_named() {
        for (spec, part) in [
            ("", "no path"),
            ("p,memory=x", "none, ro or rw"),
            ("p,observe=root", "it is a user id"),
            ("p,observe=", "UID"),
            ("p,rights=all", "unknown key 'rights'"),
            ("p,memory=ro,memory=rw", "twice"),
        ] {
            let line = spec.parse::<PluginSocketSpec>().unwrap_err().to_string();
            assert!(line.contains(part), "{spec}: {line}");
        }
    }
}
