//! The guest's address spaces as tables of devices: one [`Bus`] for I/O ports, one for MMIO.
//!
//! A bus is built once, before any vCPU runs, and never changes: vCPU threads look devices up
//! without a lock. An access belongs to the device whose range holds its **first** byte and is
//! delivered whole, even where it runs past the range's end, so a device checks `offset` and the
//! length of `data` itself: both are chosen by the guest.
//!
//! | access | claimed | unclaimed |
//! |---|---|---|
//! | read | [`BusDevice::read`] | every byte `0xff`, as a floating bus gives (0 in a plugin VM) |
//! | write | [`BusDevice::write`] | dropped |

use std::fmt;
use std::sync::Arc;

/// Why the guest's run came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest asked to be powered off.
    Shutdown,
    /// The guest asked for a reset, or ended in a triple fault.
    Reset,
    /// The guest cannot go on; the text holds the facts, on one line.
    Error(String),
}

/// What became of one access to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// The access is complete; a read has filled `data`.
    Done,
    /// A kick interrupted the device's wait and nothing was completed: the vCPU parks with the
    /// access outstanding and makes it again, with the same arguments, once it is resumed. A
    /// device that has already begun the access (sent a request, say) remembers so per vCPU.
    Retry,
    /// The access ended the VM.
    Exit(VmExit),
}

/// A device the guest reaches by port or memory-mapped access.
///
/// Called on vCPU threads, several at once. Nothing here may block without an end: a device that
/// waits gives up with [`Outcome::Retry`] as soon as its vCPU is kicked.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the range's start into `data`.
    fn read(&self, vcpu: usize, offset: u64, data: &mut [u8]) -> Outcome;
    /// Writes `data` at `offset` from the range's start.
    fn write(&self, vcpu: usize, offset: u64, data: &[u8]) -> Outcome;
}

/// Why a range cannot be put on a bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// A range of no bytes claims nothing.
    #[error("the range at {base:#x} is empty")]
    Empty {
        /// First address of the range.
        base: u64,
    },
    /// The range runs past the last 64-bit address.
    #[error("the range of {len:#x} bytes at {base:#x} ends beyond the address space")]
    PastEnd {
        /// First address of the range.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device holds part of the range.
    #[error(
        "the range {base:#x}..={last:#x} overlaps {taken_base:#x}..={taken_last:#x}, which another \
         device holds"
    )]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Last address of the refused range.
        last: u64,
        /// First address of the range that is there already.
        taken_base: u64,
        /// Last address of the range that is there already.
        taken_last: u64,
    },
}

struct Range {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.base, self.last)
    }
}

/// An immutable table from addresses to devices.
#[derive(Debug)]
pub struct Bus {
    ranges: Box<[Range]>,
    nobody: u8,
}

impl Default for Bus {
    fn default() -> Self {
        Self::builder().build()
    }
}

impl Bus {
    /// Starts an empty bus.
    pub fn builder() -> BusBuilder {
        BusBuilder::default()
    }

    /// Reads at `addr` on behalf of `vcpu`.
    #[inline]
    pub fn read(&self, vcpu: usize, addr: u64, data: &mut [u8]) -> Outcome {
        match self.find(addr) {
            Some(range) => range.device.read(vcpu, addr - range.base, data),
            None => {
                data.fill(self.nobody);
                Outcome::Done
            }
        }
    }

    /// Writes at `addr` on behalf of `vcpu`.
    #[inline]
    pub fn write(&self, vcpu: usize, addr: u64, data: &[u8]) -> Outcome {
        match self.find(addr) {
            Some(range) => range.device.write(vcpu, addr - range.base, data),
            None => Outcome::Done,
        }
    }

    /// Whether a device holds any of `base..=last`.
    pub fn holds(&self, base: u64, last: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.base <= last);
        after.checked_sub(1).is_some_and(|at| self.ranges[at].last >= base)
    }

    #[inline]
    fn find(&self, addr: u64) -> Option<&Range> {
        let after = self.ranges.partition_point(|range| range.base <= addr);
        let range = &self.ranges[after.checked_sub(1)?];
        (addr <= range.last).then_some(range)
    }
}

/// Collects the ranges of a [`Bus`].
#[derive(Debug)]
pub struct BusBuilder {
    /// Sorted by base, disjoint.
    ranges: Vec<Range>,
    nobody: u8,
}

impl Default for BusBuilder {
    fn default() -> Self {
        Self { ranges: Vec::new(), nobody: 0xff }
    }
}

impl BusBuilder {
    /// What every byte of an unclaimed read is, other than `0xff`.
    pub fn nobody(mut self, value: u8) -> Self {
        self.nobody = value;
        self
    }

    /// Gives the `len` bytes from `base` on to `device`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, does not fit the address space, or shares a byte with
    /// one added before.
    pub fn add(
        mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<Self, BusError> {
        let room = len.checked_sub(1).ok_or(BusError::Empty { base })?;
        let last = base.checked_add(room).ok_or(BusError::PastEnd { base, len })?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let before = at.checked_sub(1).map(|i| &self.ranges[i]).filter(|range| range.last >= base);
        let after = self.ranges.get(at).filter(|range| range.base <= last);
        if let Some(taken) = before.or(after) {
            return Err(BusError::Overlap {
                base,
                last,
                taken_base: taken.base,
                taken_last: taken.last,
            });
        }
        self.ranges.insert(at, Range { base, last, device });
        Ok(self)
    }

    /// The finished bus.
    pub fn build(self) -> Bus {
        Bus { ranges: self.ranges.into_boxed_slice(), nobody: self.nobody }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    /// Answers reads with its own mark and remembers the writes it saw.
    #[derive(Default)]
    struct Marked(u8, Mutex<Vec<(usize, u64, Vec<u8>)>>);

    impl BusDevice for Marked {
        fn read(&self, _vcpu: usize, offset: u64, data: &mut [u8]) -> Outcome {
            data.fill(self.0.wrapping_add(offset as u8));
            Outcome::Done
        }
        fn write(&self, vcpu: usize, offset: u64, data: &[u8]) -> Outcome {
            self.1.lock().unwrap().push((vcpu, offset, data.to_vec()));
            Outcome::Done
        }
    }

    fn marked(mark: u8) -> Arc<Marked> {
        Arc::new(Marked(mark, Mutex::default()))
    }

    #[test]
    fn an_access_goes_to_the_device_that_holds_its_first_byte() {
        let (low, high) = (marked(0x10), marked(0x80));
        let bus = Bus::builder()
            .add(0x108, 8, high.clone())
            .unwrap()
            .add(0x100, 8, low.clone())
            .unwrap()
            .build();
        let mut data = [0; 4];
        // Starts in the lower range and ends in the upper one: delivered whole to the lower.
        assert_eq!(bus.read(0, 0x107, &mut data), Outcome::Done);
        assert_eq!(data, [0x17; 4]);
        assert_eq!(bus.read(0, 0x108, &mut data), Outcome::Done);
        assert_eq!(data, [0x80; 4]);
        assert_eq!(bus.write(3, 0x10f, &[1, 2]), Outcome::Done);
        assert_eq!(*high.1.lock().unwrap(), [(3, 7, vec![1, 2])]);
        assert!(low.1.lock().unwrap().is_empty());
    }

    #[test]
    fn nobody_home_reads_all_ones_and_drops_writes() {
        let bus = Bus::builder().add(0x100, 8, marked(0)).unwrap().build();
        for addr in [0, 0xff, 0x108, u64::MAX] {
            let mut data = [0; 8];
            assert_eq!(bus.read(0, addr, &mut data), Outcome::Done);
            assert_eq!(data, [0xff; 8], "{addr:#x}");
            assert_eq!(bus.write(0, addr, &[1]), Outcome::Done);
        }
        let mut data = [0; 1];
        assert_eq!(Bus::default().read(0, 0, &mut data), Outcome::Done);
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn a_range_that_cannot_be_is_refused() {
        let refused = |base, len| {
            Bus::builder().add(0x100, 8, marked(0)).unwrap().add(base, len, marked(1)).unwrap_err()
        };
        assert_eq!(refused(0x200, 0), BusError::Empty { base: 0x200 });
        assert_eq!(refused(u64::MAX, 2), BusError::PastEnd { base: u64::MAX, len: 2 });
        for (base, len) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x104, 2), (0, 0x1000), (0x100, 1)]
        {
            assert_eq!(
                refused(base, len),
                BusError::Overlap {
                    base,
                    last: base + len - 1,
                    taken_base: 0x100,
                    taken_last: 0x107
                }
            );
        }
        assert!(Bus::builder().add(u64::MAX, 1, marked(0)).is_ok());
        assert!(Bus::builder().add(0, u64::MAX, marked(0)).is_ok());
    }

    proptest! {
        /// Any set of ranges the builder takes answers as a plain scan of the list would.
        #[test]
        fn lookup_agrees_with_a_scan(ranges in prop::collection::vec((0u64..200, 1u64..20), 0..20)) {
            let mut taken: Vec<(u64, u64, u8)> = Vec::new();
            let mut builder = Bus::builder();
            for (mark, &(base, len)) in ranges.iter().enumerate() {
                let clash = taken.iter().any(|&(b, l, _)| base < b + l && b < base + len);
                let device = Arc::new(Constant(mark as u8));
                match builder.add(base, len, device) {
                    Ok(grown) => {
                        prop_assert!(!clash);
                        builder = grown;
                        taken.push((base, len, mark as u8));
                    }
                    Err(error) => {
                        prop_assert!(clash, "{error}");
                        builder = rebuilt(&taken);
                    }
                }
            }
            let bus = builder.build();
            for addr in 0..230 {
                let mut data = [0xee];
                prop_assert_eq!(bus.read(0, addr, &mut data), Outcome::Done);
                let held = |base: u64, last: u64| taken.iter().any(|&(b, l, _)| b <= last && base < b + l);
                for last in [addr, addr + 1, addr + 7] {
                    prop_assert_eq!(bus.holds(addr, last), held(addr, last));
                }
                let want = taken.iter().find(|&&(b, l, _)| (b..b + l).contains(&addr)).map_or(0xff, |t| t.2);
                prop_assert_eq!(data[0], want);
            }
        }
    }

    /// A refused range costs the builder: it is made again without that range.
    fn rebuilt(taken: &[(u64, u64, u8)]) -> BusBuilder {
        taken.iter().fold(Bus::builder(), |builder, &(base, len, mark)| {
            builder.add(base, len, Arc::new(Constant(mark))).unwrap()
        })
    }

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, _: usize, _: u64, data: &mut [u8]) -> Outcome {
            data.fill(self.0);
            Outcome::Done
        }
        fn write(&self, _: usize, _: u64, _: &[u8]) -> Outcome {
            Outcome::Done
        }
    }
}
