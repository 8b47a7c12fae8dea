//! The options of `cellblock run` that concern a plugin.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::config::PluginKeys;
use crate::plugin_process::{
    PluginConfig, TapConfig, gid_map, gid_map_file, mac, mount, mount_file, overlap,
};
use cellblock_seccomp::plugin::{GidMap, Mount};

/// A plugin makes all of its machine: memory and devices.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Plugin")]
pub(super) struct PluginArgs {
    /// Have this program control the machine: jailed, with CROSVM_SOCKET in its environment.
    /// Without a kernel it makes the memory and all devices
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// An argument of the plugin; give it again for more. They are all that it gets: the
    /// first is its argv[0]
    #[arg(short = 'p', long = "params", value_name = "PARAM", allow_hyphen_values = true)]
    params: Vec<OsString>,
    /// Accepted for old command lines: the plugin's root is always an empty tmpfs
    #[arg(long, value_name = "DIR")]
    plugin_root: Option<PathBuf>,
    /// Show a file or folder in the plugin's root; read-only unless the third field is true
    #[arg(long, value_name = "SRC[:[DST][:WRITABLE]]", value_parser = mount)]
    plugin_mount: Vec<Mount>,
    /// Read such mounts from a file, one a line
    #[arg(long, value_name = "FILE")]
    plugin_mount_file: Option<PathBuf>,
    /// Give the plugin a group: its id inside, outside (the same unless given), and how many
    #[arg(long, value_name = "IN[:[OUT][:COUNT]]", value_parser = gid_map)]
    plugin_gid_map: Vec<GidMap>,
    /// Read such groups from a file, one a line
    #[arg(long, value_name = "FILE")]
    plugin_gid_map_file: Option<PathBuf>,
    /// Put the plugin under DIR/plugin.policy, in minijail's text form, instead of our own
    #[arg(long, value_name = "DIR")]
    seccomp_policy_dir: Option<PathBuf>,
    /// Make a TAP device for the plugin: the host's address on it
    #[arg(long, value_name = "ADDRESS")]
    host_ip: Option<Ipv4Addr>,
    /// The mask of its network
    #[arg(long, value_name = "MASK")]
    netmask: Option<Ipv4Addr>,
    /// Its hardware address
    #[arg(long, value_name = "ADDRESS", value_parser = mac)]
    mac: Option<[u8; 6]>,
    /// Use an existing TAP device
    #[arg(long, value_name = "NAME")]
    tap_name: Vec<String>,
    /// Use a TAP device that is open under this number
    #[arg(long, value_name = "FD")]
    tap_fd: Vec<i32>,
}

/// Options, and whether each is given.
impl PluginArgs {
    /// With what the configuration file says where the command line says nothing. None
    /// where there is no plugin.
    pub(super) fn into_config(self, file: PluginKeys) -> Result<Option<PluginConfig>, Failure> {
        let args = self.with(file)?;
        let Some(program) = args.plugin.clone() else {
            return match args.strays() {
                Some(option) => Err(Failure::Usage(format!(
                    "{option} concerns a plugin, and there is none; say --plugin PATH"
                ))),
                None => Ok(None),
            };
        };
        let taps = args.taps()?;
        let mut mounts = args.plugin_mount;
        if let Some(path) = &args.plugin_mount_file {
            mounts.extend(from_file(path, mount_file)?);
        }
        let mut gid_maps = args.plugin_gid_map;
        if let Some(path) = &args.plugin_gid_map_file {
            gid_maps.extend(from_file(path, gid_map_file)?);
        }
        if let Some(why) = overlap(&gid_maps) {
            return Err(Failure::Usage(why));
        }
        Ok(Some(PluginConfig {
            program,
            parameters: args.params,
            root: args.plugin_root,
            mounts,
            gid_maps,
            policy_dir: args.seccomp_policy_dir,
            taps,
        }))
    }

    fn with(mut self, file: PluginKeys) -> Result<PluginArgs, Failure> {
        fn list<T>(
            own: &mut Vec<T>,
            texts: Vec<String>,
            key: &str,
            read: impl Fn(&str) -> Result<T, String>,
        ) -> Result<(), Failure> {
            if own.is_empty() {
                let read = |text: String| {
                    read(&text).map_err(|why| Failure::Usage(format!("{key} '{text}': {why}")))
                };
                *own = texts.into_iter().map(read).collect::<Result<_, _>>()?;
            }
            Ok(())
        }
        self.plugin = self.plugin.or(file.plugin);
        list(&mut self.params, file.params, "params", |text| Ok(text.into()))?;
        self.plugin_root = self.plugin_root.or(file.plugin_root);
        list(&mut self.plugin_mount, file.plugin_mount, "plugin-mount", mount)?;
        self.plugin_mount_file = self.plugin_mount_file.or(file.plugin_mount_file);
        list(&mut self.plugin_gid_map, file.plugin_gid_map, "plugin-gid-map", gid_map)?;
        self.plugin_gid_map_file = self.plugin_gid_map_file.or(file.plugin_gid_map_file);
        self.seccomp_policy_dir = self.seccomp_policy_dir.or(file.seccomp_policy_dir);
        self.host_ip = self.host_ip.or(file.host_ip);
        self.netmask = self.netmask.or(file.netmask);
        if let (None, Some(text)) = (self.mac, file.mac) {
            self.mac = Some(mac(&text).map_err(|why| Failure::Usage(format!("mac: {why}")))?);
        }
        list(&mut self.tap_name, file.tap_name, "tap-name", |text| Ok(text.into()))?;
        if self.tap_fd.is_empty() {
            self.tap_fd = file.tap_fd;
        }
        Ok(self)
    }

    /// An option that is given without a plugin.
    fn strays(&self) -> Option<&'static str> {
        [
            (!self.params.is_empty(), "-p"),
            (self.plugin_root.is_some(), "--plugin-root"),
            (!self.plugin_mount.is_empty(), "--plugin-mount"),
            (self.plugin_mount_file.is_some(), "--plugin-mount-file"),
            (!self.plugin_gid_map.is_empty(), "--plugin-gid-map"),
            (self.plugin_gid_map_file.is_some(), "--plugin-gid-map-file"),
            (self.seccomp_policy_dir.is_some(), "--seccomp-policy-dir"),
            (self.host_ip.is_some(), "--host-ip"),
            (self.netmask.is_some(), "--netmask"),
            (self.mac.is_some(), "--mac"),
            (!self.tap_name.is_empty(), "--tap-name"),
            (!self.tap_fd.is_empty(), "--tap-fd"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }

    fn taps(&self) -> Result<Vec<TapConfig>, Failure> {
        let mut taps: Vec<TapConfig> =
            self.tap_fd.iter().map(|number| TapConfig::Fd(*number)).collect();
        if let Some(number) = self.tap_fd.iter().find(|number| **number < 3) {
            let why = format!("--tap-fd {number}: 0, 1 and 2 are standard input and output");
            return Err(Failure::Usage(why));
        }
        taps.extend(self.tap_name.iter().cloned().map(TapConfig::Name));
        match (self.host_ip, self.netmask, self.mac) {
            (None, None, None) => {}
            (Some(host_ip), Some(netmask), Some(mac)) if taps.is_empty() => {
                taps.push(TapConfig::New { host_ip, netmask, mac });
            }
            (Some(_), Some(_), Some(_)) => {
                return Err(Failure::Usage(
                    "--host-ip, --netmask and --mac make a new TAP device; --tap-name and \
                     --tap-fd use another: say one or the other"
                        .into(),
                ));
            }
            _ => {
                return Err(Failure::Usage(
                    "--host-ip, --netmask and --mac belong together: give all three".into(),
                ));
            }
        }
        Ok(taps)
    }
}

fn from_file<T>(
    path: &std::path::Path,
    read: fn(&str) -> Result<Vec<T>, String>,
) -> Result<Vec<T>, Failure> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::Error(format!("reading {shown}: {error}")))?;
    read(&text).map_err(|why| Failure::Usage(format!("{shown}, {why}")))
}
