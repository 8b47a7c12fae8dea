//! The command line: words, some of them `key=value`.

const MAX: usize = 2048;

/// An owned copy of the command line.
pub struct Cmdline {
    bytes: [u8; MAX],
    length: usize,
}

/// A virtio-mmio device named on the command line.
#[derive(Clone, Copy)]
pub struct MmioDevice {
    /// Address of its registers.
    pub address: u64,
    /// Its interrupt line (global system interrupt).
    pub line: u32,
}

impl Cmdline {
    /// Takes the first `length` bytes.
    pub fn new(bytes: [u8; MAX], length: usize) -> Self {
        Self { bytes, length }
    }

    fn words(&self) -> impl Iterator<Item = &str> {
        let text = core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("");
        text.split_ascii_whitespace()
    }

    /// The value of the last `key=value` word.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.words().filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).last()
    }

    /// Whether the bare word `key` is there, or `key=1`.
    pub fn flag(&self, key: &str) -> bool {
        self.words().any(|word| word == key) || self.get(key) == Some("1")
    }

    /// The number after `key=`, or `default`; fails the guest if it is no number.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        match self.get(key) {
            None => default,
            Some(text) => parse(text)
                .unwrap_or_else(|| crate::exit::fail(format_args!("{key}={text}: not a number"))),
        }
    }

    /// The virtio-mmio devices, in the order of their words.
    pub fn mmio_devices(&self) -> impl Iterator<Item = MmioDevice> {
        self.words().filter_map(|word| word.strip_prefix("virtio_mmio.device=")).map(|text| {
            let device = text.split_once('@').and_then(|(_, place)| {
                let mut parts = place.split(':');
                let address = parse(parts.next()?)?;
                Some(MmioDevice { address, line: parse(parts.next()?)? as u32 })
            });
            device.unwrap_or_else(|| {
                crate::exit::fail(format_args!("virtio_mmio.device={text}: not SIZE@ADDRESS:LINE"))
            })
        })
    }
}

/// Decimal, or hexadecimal after `0x`.
pub fn parse(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
