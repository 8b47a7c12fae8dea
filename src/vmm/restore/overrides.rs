//! What a user says is different about a disk: `id=ID[,path=F][,cow[=DIR]]`.

use std::path::Path;
use std::str::FromStr;

use super::{DiskOverride, RestoreError};
use crate::cell::overlay::Place;

/// Whether all that is `named` is of one of the disks `ids` each.
pub(crate) fn check(named: &[DiskOverride], ids: &[&str]) -> Result<(), RestoreError> {
    for (n, disk) in named.iter().enumerate() {
        if !ids.contains(&disk.id.as_str()) {
            return Err(RestoreError::NoDisk(disk.id.clone(), ids.join(", ")));
        }
        if named[..n].iter().any(|other| other.id == disk.id) {
            return Err(RestoreError::Twice(disk.id.clone()));
        }
    }
    Ok(())
}

impl FromStr for DiskOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskOverride, String> {
        let wrong = || "say which disk and what of it: id=ID,path=F or id=ID,cow".to_string();
        let (mut id, mut path, mut cow) = (None, None, None);
        for part in crate::spec::split(text) {
            let (key, value) = part.split_once('=').unwrap_or((&part, ""));
            match (key, value) {
                ("id", id_of) if !id_of.is_empty() && id.is_none() => id = Some(id_of.to_string()),
                ("path", file) if !file.is_empty() && path.is_none() => path = Some(file.into()),
                ("cow", "" | "true") if cow.is_none() => cow = Some(Place::Memory),
                ("cow", dir) if cow.is_none() => cow = Some(Place::Directory(dir.into())),
                _ => return Err(wrong()),
            }
        }
        match id {
            Some(id) if path.is_some() || cow.is_some() => Ok(DiskOverride { id, path, cow }),
            _ => Err(wrong()),
        }
    }
}

impl DiskOverride {
    /// The same in words, with paths that do not depend on the directory this process is in.
    pub fn absolute(&self) -> Result<String, String> {
        let path = |path: &Path| {
            let absolute = std::path::absolute(path);
            let absolute = absolute.map_err(|error| format!("{}: {error}", path.display()))?;
            let text = absolute.to_str().ok_or_else(|| format!("{absolute:?} is not text"))?;
            Ok::<String, String>(text.replace(',', ",,"))
        };
        let mut words = format!("id={}", self.id.replace(',', ",,"));
        if let Some(image) = &self.path {
            words.push_str(&format!(",path={}", path(image)?));
        }
        match &self.cow {
            None => {}
            Some(Place::Memory) => words.push_str(",cow"),
            Some(Place::Directory(at)) => words.push_str(&format!(",cow={}", path(at)?)),
        }
        Ok(words)
    }

    /// A path that means something only in the directory of whoever wrote it.
    pub fn relative(&self) -> Option<&Path> {
        let at = match &self.cow {
            Some(Place::Directory(at)) => Some(at),
            _ => None,
        };
        self.path.iter().chain(at).map(|path| path.as_path()).find(|path| path.is_relative())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn a_disk_is_an_id_and_a_path() {
        let disk = |text: &str| text.parse::<DiskOverride>();
        let other = |path: Option<&str>, cow| DiskOverride {
            id: "disk0".into(),
            path: path.map(PathBuf::from),
            cow,
        };
        assert_eq!(disk("id=disk0,path=/a,,b"), Ok(other(Some("/a,b"), None)));
        assert_eq!(disk("id=disk0,cow"), Ok(other(None, Some(Place::Memory))));
        let at = Some(Place::Directory("/tmp".into()));
        assert_eq!(disk("cow=/tmp,path=a,id=disk0"), Ok(other(Some("a"), at)));
        let words = |text: &str| disk(text).unwrap().absolute().unwrap();
        assert_eq!(words("cow,path=/a,,b,id=d"), "id=d,path=/a,,b,cow");
        let here = std::env::current_dir().unwrap();
        assert_eq!(words("id=d,cow=x"), format!("id=d,cow={}", here.join("x").display()));
        let relative = |text: &str| disk(text).unwrap().relative().map(Path::to_path_buf);
        assert_eq!(relative("id=d,path=/a,cow=b"), Some("b".into()));
        assert_eq!(
            (relative("id=d,path=/a,cow"), relative("id=d,path=a")),
            (None, Some("a".into()))
        );
        for text in ["disk0=/a", "id=,path=/a", "id=a,path=", "id=a", "id=a,id=b,cow", ""] {
            assert!(disk(text).is_err(), "{text}");
        }
    }
}
