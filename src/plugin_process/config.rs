//! What the command line says about a plugin.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use cellblock_seccomp::plugin::{GidMap, Mount};

/// `--plugin` and what belongs to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PluginConfig {
    /// The program.
    pub program: PathBuf,
    /// `-p`: all of its arguments.
    pub parameters: Vec<OsString>,
    /// `--plugin-root`.
    pub root: Option<PathBuf>,
    /// `--plugin-mount` and the lines of `--plugin-mount-file`.
    pub mounts: Vec<Mount>,
    /// `--plugin-gid-map` and the lines of `--plugin-gid-map-file`.
    pub gid_maps: Vec<GidMap>,
    /// `--seccomp-policy-dir`.
    pub policy_dir: Option<PathBuf>,
    /// `--tap-fd`, `--tap-name`, or a new one.
    pub taps: Vec<TapConfig>,
}

/// A TAP device for the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapConfig {
    /// One that the VMM was given open.
    Fd(i32),
    /// One that exists.
    Name(String),
    /// A new one, with the host's side of it.
    New {
        /// The host's address.
        host_ip: std::net::Ipv4Addr,
        /// The network's mask.
        netmask: std::net::Ipv4Addr,
        /// The host's hardware address.
        mac: [u8; 6],
    },
}

/// Reads `SRC[:[DST][:true|false]]`.
pub fn mount(text: &str) -> Result<Mount, String> {
    let mut fields = text.split(':');
    let source = fields.next().filter(|s| !s.is_empty()).ok_or("it starts with a path")?;
    let source = PathBuf::from(source);
    let destination = match fields.next() {
        None | Some("") => std::path::absolute(&source).map_err(|e| e.to_string())?,
        Some(path) => PathBuf::from(path),
    };
    let writable = match fields.next() {
        None | Some("" | "false") => false,
        Some("true") => true,
        Some(other) => return Err(format!("writable is true or false, not {other:?}")),
    };
    if fields.next().is_some() {
        return Err("it is SRC[:[DST][:WRITABLE]]".into());
    }
    let plain = |path: &Path| {
        path.is_absolute()
            && path.components().skip(1).all(|part| matches!(part, Component::Normal(_)))
            && path.file_name().is_some()
    };
    if !plain(&destination) {
        let path = destination.display();
        return Err(format!(
            "{path} is no place in the plugin's root: an absolute path without .."
        ));
    }
    // Further device nodes may be shown beside the jail's own four.
    if destination.starts_with("/proc") || destination == Path::new("/dev") {
        return Err(format!("{} is the jail's own", destination.display()));
    }
    Ok(Mount { source, destination, writable })
}

/// Reads `IN[:[OUT][:COUNT]]`: the outer id is the inner one, the count 1, unless given.
pub fn gid_map(text: &str) -> Result<GidMap, String> {
    let mut fields = text.split(':');
    let number = |field: Option<&str>, default: Option<u32>| match field {
        None | Some("") => default.ok_or_else(|| "it starts with a group id".to_string()),
        Some(text) => text.parse().map_err(|_| format!("{text:?} is not a number of 32 bits")),
    };
    let inside = number(fields.next(), None)?;
    let outside = number(fields.next(), Some(inside))?;
    let count = number(fields.next(), Some(1))?;
    if fields.next().is_some() {
        return Err("it is IN[:[OUT][:COUNT]]".into());
    }
    if count == 0 || inside.checked_add(count).is_none() || outside.checked_add(count).is_none() {
        return Err("the range is empty or ends beyond the last id".into());
    }
    if inside == 0 {
        return Err("group 0 is the plugin's own, and mapped already".into());
    }
    Ok(GidMap { inside, outside, count })
}

/// Says which two maps have an id in common, if two have: the kernel refuses that.
pub fn overlap(maps: &[GidMap]) -> Option<String> {
    let meets = |a: u32, b: u32, first: &GidMap, second: &GidMap| {
        u64::from(a) < u64::from(b) + u64::from(second.count)
            && u64::from(b) < u64::from(a) + u64::from(first.count)
    };
    maps.iter().enumerate().find_map(|(n, a)| {
        let b = maps[..n]
            .iter()
            .find(|b| meets(a.inside, b.inside, a, b) || meets(a.outside, b.outside, a, b))?;
        Some(format!(
            "the group maps {}:{}:{} and {}:{}:{} overlap",
            b.inside, b.outside, b.count, a.inside, a.outside, a.count
        ))
    })
}

/// Reads a hardware address, `02:00:00:00:00:01`.
pub fn mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("{text:?} is not six bytes as in 02:00:00:00:00:01");
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| match part.len() {
            2 => u8::from_str_radix(part, 16).map_err(|_| wrong()),
            _ => Err(wrong()),
        })
        .collect::<Result<_, _>>()?;
    let mac: [u8; 6] = bytes.try_into().map_err(|_| wrong())?;
    match mac[0] & 1 {
        0 => Ok(mac),
        _ => Err(format!("{text} is a group address; the first byte is even")),
    }
}

/// The entries of a file of mounts, one a line; `#` starts a comment.
pub fn mount_file(text: &str) -> Result<Vec<Mount>, String> {
    lines(text, mount)
}

/// The entries of a file of group maps, one a line; `#` starts a comment.
pub fn gid_map_file(text: &str) -> Result<Vec<GidMap>, String> {
    lines(text, gid_map)
}

fn lines<T>(text: &str, read: fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.lines()
        .enumerate()
        .map(|(n, line)| (n + 1, line.split('#').next().unwrap_or("").trim()))
        .filter(|(_, line)| !line.is_empty())
        .map(|(n, line)| read(line).map_err(|why| format!("line {n}: {why}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts() {
        let of = |source: &str, destination: &str, writable| {
            Ok(Mount { source: source.into(), destination: destination.into(), writable })
        };
        assert_eq!(mount("/a/b"), of("/a/b", "/a/b", false));
        assert_eq!(mount("/a:/b"), of("/a", "/b", false));
        assert_eq!(mount("/a:/b:true"), of("/a", "/b", true));
        assert_eq!(mount("/a::true"), of("/a", "/a", true));
        assert_eq!(mount("/a:/b:false"), of("/a", "/b", false));
        assert_eq!(mount("/a:/dev/net"), of("/a", "/dev/net", false));
        for text in [
            "",
            ":/b",
            "/a:/b:yes",
            "/a:/b:true:x",
            "/a:b",
            "/a:/b/../c",
            "/a:/",
            "/a:/proc",
            "/a:/dev",
        ] {
            assert!(mount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn group_maps() {
        let of = |inside, outside, count| Ok(GidMap { inside, outside, count });
        assert_eq!(gid_map("5"), of(5, 5, 1));
        assert_eq!(gid_map("5:100"), of(5, 100, 1));
        assert_eq!(gid_map("5:100:3"), of(5, 100, 3));
        assert_eq!(gid_map("5::3"), of(5, 5, 3));
        for text in ["", ":5", "x", "5:x", "5:6:0", "5:6:7:8", "0", "-1", "5:4294967295:2"] {
            assert!(gid_map(text).is_err(), "{text}");
        }
        let maps = |texts: &[&str]| texts.iter().map(|t| gid_map(t).unwrap()).collect::<Vec<_>>();
        assert_eq!(overlap(&maps(&["1:10:5", "6:20:5", "11:15:5"])), None);
        assert!(overlap(&maps(&["1:10:5", "5:20:5"])).is_some());
        assert!(overlap(&maps(&["1:10:5", "6:14:5"])).is_some());
    }

    #[test]
    fn files_of_entries() {
        let text = "# all of them\n\n/a:/b # one\n  /c\n";
        assert_eq!(mount_file(text).unwrap().len(), 2);
        assert!(mount_file("/a\n/b:c").unwrap_err().starts_with("line 2: "));
        assert_eq!(gid_map_file("1\n2:3").unwrap().len(), 2);
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(mac("02:00:5e:10:00:fF"), Ok([2, 0, 0x5e, 0x10, 0, 0xff]));
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "zz:00:00:00:00:00",
            "03:00:00:00:00:00",
        ] {
            assert!(mac(text).is_err(), "{text}");
        }
    }
}
