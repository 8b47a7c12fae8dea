//! What a user says is different about a disk: `id=ID[,path=F][,cow[=DIR]]`.

use std::str::FromStr;

use super::DiskOverride;
use crate::cell::overlay::Place;

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
        for text in ["disk0=/a", "id=,path=/a", "id=a,path=", "id=a", "id=a,id=b,cow", ""] {
            assert!(disk(text).is_err(), "{text}");
        }
    }
}
