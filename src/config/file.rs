//! `--config FILE.toml`: the options of `cellblock run` under their own names.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cellblock_devices::protocol::{LogLevel, SeccompMode};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::remedy::Remedy;
use crate::spec::{DiskSpec, PluginSocketSpec, SerialSpec};

/// The keys of a configuration file. Relative paths in it are relative to the
/// directory the program is started in, as they are for options.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// `--kernel`.
    pub kernel: Option<PathBuf>,
    /// `--initrd`.
    pub initrd: Option<PathBuf>,
    /// `--cmdline`.
    pub cmdline: Option<String>,
    /// `--cpus`; a number.
    #[serde(deserialize_with = "cpus")]
    pub cpus: Option<u8>,
    /// `--memory`; a string, or a number of MiB.
    #[serde(deserialize_with = "memory")]
    pub memory: Option<u64>,
    /// `--disk`; a list of SPECs.
    #[serde(deserialize_with = "disks")]
    pub disk: Vec<DiskSpec>,
    /// `--serial`.
    #[serde(deserialize_with = "serial")]
    pub serial: Option<SerialSpec>,
    /// `--control`.
    pub control: Option<PathBuf>,
    /// `--snapshot-out`.
    pub snapshot_out: Option<PathBuf>,
    /// `--snapshot-after-ms`.
    pub snapshot_after_ms: Option<u64>,
    /// `--snapshot-at-heartbeat`.
    pub snapshot_at_heartbeat: Option<u64>,
    /// `--snapshot-on-listener`.
    pub snapshot_on_listener: bool,
    /// `--snapshot-on-pre-exec`.
    pub snapshot_on_pre_exec: bool,
    /// `--snapshot-quiesce-ms`.
    pub snapshot_quiesce_ms: Option<u64>,
    /// `--plugin-socket`.
    #[serde(deserialize_with = "plugin_socket")]
    pub plugin_socket: Option<PluginSocketSpec>,
    /// `--disable-sandbox`.
    pub disable_sandbox: bool,
    /// `--seccomp`.
    #[serde(deserialize_with = "seccomp")]
    pub seccomp: Option<SeccompMode>,
    /// `--max-deaths`; a number.
    pub max_deaths: Option<std::num::NonZeroU16>,
    /// `--device-timeout`.
    #[serde(deserialize_with = "device_timeout")]
    pub device_timeout: Option<Duration>,
    /// `--log`.
    #[serde(deserialize_with = "log")]
    pub log: Option<LogLevel>,
    // What concerns a plugin: see [`PluginKeys`]. (Not flattened: then unknown keys would
    // be passed over.)
    plugin: Option<PathBuf>,
    params: Vec<String>,
    plugin_root: Option<PathBuf>,
    plugin_mount: Vec<String>,
    plugin_mount_file: Option<PathBuf>,
    plugin_gid_map: Vec<String>,
    plugin_gid_map_file: Option<PathBuf>,
    seccomp_policy_dir: Option<PathBuf>,
    host_ip: Option<Ipv4Addr>,
    netmask: Option<Ipv4Addr>,
    mac: Option<String>,
    tap_name: Vec<String>,
    tap_fd: Vec<i32>,
}

/// The keys that concern a plugin, each named as its option; lists for what may be given
/// more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // see there
pub struct PluginKeys {
    pub plugin: Option<PathBuf>,
    pub params: Vec<String>,
    pub plugin_root: Option<PathBuf>,
    pub plugin_mount: Vec<String>,
    pub plugin_mount_file: Option<PathBuf>,
    pub plugin_gid_map: Vec<String>,
    pub plugin_gid_map_file: Option<PathBuf>,
    pub seccomp_policy_dir: Option<PathBuf>,
    pub host_ip: Option<Ipv4Addr>,
    pub netmask: Option<Ipv4Addr>,
    pub mac: Option<String>,
    pub tap_name: Vec<String>,
    pub tap_fd: Vec<i32>,
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It could not be read.
    #[error("reading the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// It does not say what it may.
    #[error("configuration file {}, line {line}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The parser's or the option's reason.
        message: String,
    },
}

impl Remedy for ConfigFileError {
    fn remedy(&self) -> Option<String> {
        match self {
            ConfigFileError::Read { .. } => Some("check the path given with --config".into()),
            ConfigFileError::Content { .. } => {
                Some("its keys are the options of 'cellblock run' without the dashes".into())
            }
        }
    }
}

impl ConfigFile {
    /// What it says about a plugin, taken out.
    pub fn plugin(&mut self) -> PluginKeys {
        let file = std::mem::take(self);
        let keys = PluginKeys {
            plugin: file.plugin,
            params: file.params,
            plugin_root: file.plugin_root,
            plugin_mount: file.plugin_mount,
            plugin_mount_file: file.plugin_mount_file,
            plugin_gid_map: file.plugin_gid_map,
            plugin_gid_map_file: file.plugin_gid_map_file,
            seccomp_policy_dir: file.seccomp_policy_dir,
            host_ip: file.host_ip,
            netmask: file.netmask,
            mac: file.mac,
            tap_name: file.tap_name,
            tap_fd: file.tap_fd,
        };
        *self = ConfigFile {
            kernel: file.kernel,
            initrd: file.initrd,
            cmdline: file.cmdline,
            cpus: file.cpus,
            memory: file.memory,
            disk: file.disk,
            serial: file.serial,
            control: file.control,
            disable_sandbox: file.disable_sandbox,
            seccomp: file.seccomp,
            log: file.log,
            ..ConfigFile::default()
        };
        keys
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<ConfigFile, ConfigFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigFileError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| ConfigFileError::Content {
            path: path.to_owned(),
            line: error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1),
            message: error.message().to_owned(),
        })
    }
}

/// A value as TOML may spell it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a number")]
enum Scalar {
    Number(u64),
    Text(String),
}

fn cpus<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u8>, D::Error> {
    let count = u64::deserialize(from)?;
    super::cpus(&count.to_string()).map(Some).map_err(D::Error::custom)
}

fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = match Scalar::deserialize(from)? {
        Scalar::Number(mebibytes) => mebibytes.to_string(),
        Scalar::Text(text) => text,
    };
    super::memory(&text).map(Some).map_err(D::Error::custom)
}

fn disks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<DiskSpec>, D::Error> {
    let specs = Vec::<String>::deserialize(from)?;
    specs.iter().map(|spec| spec.parse().map_err(D::Error::custom)).collect()
}

fn serial<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SerialSpec>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(D::Error::custom)
}

fn plugin_socket<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PluginSocketSpec>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(D::Error::custom)
}

fn seccomp<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SeccompMode>, D::Error> {
    super::seccomp(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

fn device_timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    super::device_timeout(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

fn log<'de, D: Deserializer<'de>>(from: D) -> Result<Option<LogLevel>, D::Error> {
    crate::logging::level(&String::deserialize(from)?).map(Some).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remedy::one_line;

    fn read(text: &str) -> Result<ConfigFile, ConfigFileError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, text).unwrap();
        ConfigFile::read(&path)
    }

    #[test]
    fn every_key() {
        let file = read(
            r#"
            kernel = "vmlinux"
            initrd = "initrd.img"
            cmdline = "console=ttyS0"
            cpus = 2
            memory = "1G"
            disk = ["a.img,ro", "b.img"]
            serial = "pty"
            control = "/run/vm"
            disable-sandbox = true
            seccomp = "log"
            log = "debug"
            "#,
        )
        .unwrap();
        assert_eq!(file.cpus, Some(2));
        assert_eq!(file.memory, Some(1 << 30));
        assert!(file.disk.len() == 2 && file.disk[0].read_only);
        assert_eq!(file.serial, Some(SerialSpec::Pty));
        assert!(file.disable_sandbox);
        let mut file = read(
            r#"
            plugin = "p"
            params = ["p", "-x"]
            plugin-root = "/r"
            plugin-mount = ["/a:/b:true"]
            plugin-mount-file = "m"
            plugin-gid-map = ["5"]
            plugin-gid-map-file = "g"
            seccomp-policy-dir = "d"
            host-ip = "10.0.0.1"
            netmask = "255.0.0.0"
            mac = "02:00:00:00:00:01"
            tap-name = ["t"]
            tap-fd = [7]
            cpus = 3
            "#,
        )
        .unwrap();
        let keys = file.plugin();
        assert_eq!((keys.params.len(), keys.tap_fd.as_slice(), file.cpus), (2, &[7][..], Some(3)));
        assert_eq!(file.plugin(), PluginKeys::default());
        assert_eq!(read("memory = 64").unwrap().memory, Some(64 << 20));
        assert_eq!(read("").unwrap(), ConfigFile::default());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, part) in [
            ("cpus = 1\ncolour = 1", "line 2: unknown field `colour`"),
            ("cpus = 0", "line 1: a VM has 1 to 32 CPUs"),
            ("memory = 1", "at least 32M"),
            ("\n\nserial = \"tty\"", "line 3: unknown serial endpoint 'tty'"),
            ("disk = [\"a,rw\"]", "unknown key 'rw'"),
            ("seccomp = \"off\"", "kill or log"),
            ("device-timeout = \"soon\"", "500ms or 5s, or 0 for never"),
            ("kernel = ", "line 1: "),
        ] {
            let line = one_line(&read(text).unwrap_err());
            assert!(line.contains(part), "{line}");
            assert!(line.ends_with("without the dashes"), "{line}");
        }
    }
}
