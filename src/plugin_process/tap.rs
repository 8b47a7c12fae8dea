//! TAP devices, opened before privileges go.
#![allow(unsafe_code)] // interface ioctls have no safe wrappers

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::config::TapConfig;

/// A TAP device and the host's side of it.
#[derive(Debug)]
pub struct Tap {
    /// The device.
    pub fd: OwnedFd,
    /// The host's address.
    pub host_ip: Ipv4Addr,
    /// The network's mask.
    pub netmask: Ipv4Addr,
    /// The host's hardware address.
    pub mac: [u8; 6],
}

/// A TAP device that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{what} the TAP device{}", name.as_ref().map(|n| format!(" {n}")).unwrap_or_default())]
pub struct TapError {
    what: &'static str,
    name: Option<String>,
    #[source]
    source: Errno,
}

impl TapError {
    /// What can be done about it.
    pub fn remedy(&self) -> Option<&'static str> {
        match self.source {
            Errno::EPERM | Errno::EACCES => {
                Some("run as root, or give the device to this user (ip tuntap add ... user)")
            }
            Errno::ENOENT => Some("the kernel needs /dev/net/tun (modprobe tun)"),
            Errno::EBUSY => Some("somebody else has it open"),
            Errno::EBADF | Errno::ENOTTY | Errno::EBADFD | Errno::EINVAL => Some(
                "--tap-fd is the number of an open /dev/net/tun that is attached to a TAP device",
            ),
            _ => None,
        }
    }
}

/// The kernel's request about an interface (struct ifreq): a name and 24 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: [u8; 24],
}

impl Request {
    fn new(name: &str) -> Result<Request, Errno> {
        let mut request = Request { name: [0; libc::IFNAMSIZ], data: [0; 24] };
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/']) {
            return Err(Errno::EINVAL);
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }

    /// As the ifreq's sockaddr_in.
    fn address(mut self, address: Ipv4Addr) -> Request {
        self.data[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        self.data[4..8].copy_from_slice(&address.octets());
        self
    }

    fn flags(mut self, flags: i16) -> Request {
        self.data[..2].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    fn call(&mut self, fd: &OwnedFd, number: libc::c_ulong) -> Result<(), Errno> {
        // SAFETY: every ioctl used here reads and writes one struct ifreq, which is
        // not larger than this.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *self) }).map(drop)
    }
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// Of the header in front of each packet: virtio-net's, with the number of buffers.
static HEADER: libc::c_int = 12;

impl Tap {
    /// Opens or makes what is asked for.
    pub fn open(config: &TapConfig) -> Result<Tap, TapError> {
        let fail = |what, name: Option<&str>| {
            let name = name.map(str::to_owned);
            move |source| TapError { what, name, source }
        };
        let (fd, name) = match config {
            TapConfig::Fd(number) => {
                let fd = duplicate(*number).map_err(fail("taking over", None))?;
                let mut request = Request { name: [0; libc::IFNAMSIZ], data: [0; 24] };
                request.call(&fd, TUNGETIFF).map_err(fail("taking over", None))?;
                (fd, request.name())
            }
            TapConfig::Name(name) => {
                (attach(name).map_err(fail("opening", Some(name)))?, name.clone())
            }
            TapConfig::New { host_ip, netmask, mac } => {
                let (fd, name) = create().map_err(fail("making", None))?;
                set_up(&name, *host_ip, *netmask, *mac).map_err(fail("setting up", Some(&name)))?;
                (fd, name)
            }
        };
        header(&fd).map_err(fail("setting the header size of", Some(&name)))?;
        let (host_ip, netmask, mac) =
            look_up(&name).map_err(fail("reading the addresses of", Some(&name)))?;
        Ok(Tap { fd, host_ip, netmask, mac })
    }
}

/// A duplicate of a descriptor that was inherited.
fn duplicate(number: i32) -> Result<OwnedFd, Errno> {
    if number < 3 {
        return Err(Errno::EBADF);
    }
    // SAFETY: borrowed for one call, which fails where the number is no open fd.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed
        .try_clone_to_owned()
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

fn device() -> Result<OwnedFd, Errno> {
    let file = File::options().read(true).write(true).open("/dev/net/tun");
    file.map(OwnedFd::from).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

const FLAGS: i16 = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;

fn attach(name: &str) -> Result<OwnedFd, Errno> {
    let fd = device()?;
    Request::new(name)?.flags(FLAGS).call(&fd, TUNSETIFF)?;
    Ok(fd)
}

fn create() -> Result<(OwnedFd, String), Errno> {
    let fd = device()?;
    let mut request = Request::new("vmtap%d")?.flags(FLAGS);
    request.call(&fd, TUNSETIFF)?;
    Ok((fd, request.name()))
}

fn control() -> Result<OwnedFd, Errno> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

fn set_up(name: &str, ip: Ipv4Addr, mask: Ipv4Addr, mac: [u8; 6]) -> Result<(), Errno> {
    let socket = control()?;
    let request = Request::new(name)?;
    let mut hardware = request;
    hardware.data[..2].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
    hardware.data[2..8].copy_from_slice(&mac);
    hardware.call(&socket, libc::SIOCSIFHWADDR)?;
    request.address(ip).call(&socket, libc::SIOCSIFADDR)?;
    request.address(mask).call(&socket, libc::SIOCSIFNETMASK)?;
    request.flags((libc::IFF_UP | libc::IFF_RUNNING) as i16).call(&socket, libc::SIOCSIFFLAGS)
}

/// Packets carry virtio-net's header; no offloads until the plugin asks for them.
fn header(fd: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: the one takes a number, the other reads an int that lives.
    unsafe {
        Errno::result(libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, 0 as libc::c_ulong))?;
        Errno::result(libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const HEADER)).map(drop)
    }
}

/// What the interface has; an address that is not set is 0.0.0.0.
fn look_up(name: &str) -> Result<(Ipv4Addr, Ipv4Addr, [u8; 6]), Errno> {
    let socket = control()?;
    let address = |number| {
        let mut request = Request::new(name)?;
        match request.call(&socket, number) {
            Ok(()) => Ok(Ipv4Addr::from([4, 5, 6, 7].map(|n| request.data[n]))),
            Err(Errno::EADDRNOTAVAIL) => Ok(Ipv4Addr::UNSPECIFIED),
            Err(errno) => Err(errno),
        }
    };
    let mut hardware = Request::new(name)?;
    hardware.call(&socket, libc::SIOCGIFHWADDR)?;
    let mac = [2, 3, 4, 5, 6, 7].map(|n| hardware.data[n]);
    Ok((address(libc::SIOCGIFADDR)?, address(libc::SIOCGIFNETMASK)?, mac))
}
