//! Ranges of the disk given up or zeroed: DISCARD and WRITE_ZEROES (virtio 1.2, 5.2.6).
#![allow(unsafe_code)] // fallocate takes a raw file descriptor

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, c_int};
use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use super::config::SECTOR;
use super::direct::{Bounce, Direct};
use super::execute::ExecuteError;
use super::request::Refusal;

/// Bytes of struct virtio_blk_discard_write_zeroes.
pub(super) const SEGMENT: usize = 16;
/// Most segments of a discard: what Linux merges into one request at most is more,
/// but a request has its worker to itself as long as it lasts.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Most sectors of a segment of a discard: giving space up is quick.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most segments of a write-zeroes.
pub(super) const MAX_ZERO_SEGMENTS: u32 = 4;
/// Most sectors of a segment of a write-zeroes: zeros may have to be written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;

/// What is written where the file system cannot zero a range by itself.
static ZEROS: [u8; 128 << 10] = [0; 128 << 10];

/// Which command the ranges belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// The contents no longer matter.
    Discard,
    /// Read as zeros from now on.
    Zero,
}

impl Clear {
    /// Most segments of a request.
    pub fn max_segments(self) -> usize {
        match self {
            Clear::Discard => MAX_DISCARD_SEGMENTS as usize,
            Clear::Zero => MAX_ZERO_SEGMENTS as usize,
        }
    }

    fn max_sectors(self) -> u32 {
        match self {
            Clear::Discard => MAX_DISCARD_SECTORS,
            Clear::Zero => MAX_ZERO_SECTORS,
        }
    }
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is, possibly zero. The end is on the disk.
    pub len: u64,
    /// Its space may be given up.
    pub unmap: bool,
}

impl Range {
    /// Checks a segment of a request for a disk of `sectors` sectors.
    pub fn parse(clear: Clear, segment: [u8; SEGMENT], sectors: u64) -> Result<Range, Refusal> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let known = match clear {
            Clear::Discard => 0,
            Clear::Zero => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        };
        if flags & !known != 0 {
            return Err(Refusal::Flags(flags));
        }
        if count > clear.max_sectors() {
            return Err(Refusal::Clear(count));
        }
        let bytes = u64::from(count) * SECTOR;
        if sector.checked_add(count.into()).is_none_or(|end| end > sectors) {
            return Err(Refusal::Range { sector, bytes });
        }
        Ok(Range { offset: sector * SECTOR, len: bytes, unmap: flags != 0 })
    }
}

/// Clears `ranges`; durably where `write_through` says so. The caller has the turn to
/// change parts of blocks.
pub(super) fn execute(
    file: &File,
    clear: Clear,
    ranges: &[Range],
    write_through: bool,
    mut bounce: Option<(&mut Bounce, &Direct)>,
) -> Result<(), ExecuteError> {
    for range in ranges.iter().filter(|range| range.len > 0) {
        match clear {
            Clear::Discard => discard(file, range).map_err(ExecuteError::Io)?,
            Clear::Zero => zero(file, range, bounce.as_mut().map(|(b, d)| (&mut **b, *d)))?,
        }
    }
    if write_through { file.sync_data().map_err(ExecuteError::Io) } else { Ok(()) }
}

fn discard(file: &File, range: &Range) -> io::Result<()> {
    match fallocate(file, FALLOC_FL_PUNCH_HOLE, range) {
        // A discard is advice: what cannot be given up stays (virtio 1.2, 5.2.6.2).
        Err(error) if cannot(&error) => Ok(()),
        result => result,
    }
}

/// Makes `range` read as zeros; over the buffer where one is given, because the file has
/// to be written so.
pub(super) fn zero(
    file: &File,
    range: &Range,
    bounce: Option<(&mut Bounce, &Direct)>,
) -> Result<(), ExecuteError> {
    let modes = [FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE];
    for mode in &modes[usize::from(!range.unmap)..] {
        match fallocate(file, *mode, range) {
            Err(error) if cannot(&error) => {}
            result => return result.map_err(ExecuteError::Io),
        }
    }
    match bounce {
        None => write_zeros(file, range).map_err(ExecuteError::Io),
        Some((bounce, direct)) => {
            let zeros = |into: &mut [u8]| {
                into.fill(0);
                Ok(())
            };
            bounce.write((file, direct), range.offset, range.len, false, zeros)
        }
    }
}

fn write_zeros(file: &File, range: &Range) -> io::Result<()> {
    let mut done = 0;
    while done < range.len {
        let n = (range.len - done).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..n as usize], range.offset + done)?;
        done += n;
    }
    Ok(())
}

/// The file system or the block device has no such operation, or not at this alignment.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
}

fn fallocate(file: &File, mode: c_int, range: &Range) -> io::Result<()> {
    loop {
        // SAFETY: touches no memory of this process. The range is on the disk, whose
        // size fits an i64.
        let result = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode | FALLOC_FL_KEEP_SIZE,
                range.offset as i64,
                range.len as i64,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::execute::Disk;
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    const SECTORS: u64 = 2048;

    fn segment(sector: u64, count: u32, flags: u32) -> [u8; SEGMENT] {
        let mut bytes = [0; SEGMENT];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    fn parse(clear: Clear, sector: u64, count: u32, flags: u32) -> Result<Range, Refusal> {
        Range::parse(clear, segment(sector, count, flags), SECTORS)
    }

    fn disk(file: File) -> Disk {
        let size = SECTORS * SECTOR;
        file.write_all_at(&vec![0xa5; size as usize], 0).expect("fill");
        file.sync_all().expect("allocate");
        Disk {
            file,
            size,
            block_size: 4096,
            read_only: false,
            id: Default::default(),
            direct: None,
            overlay: None,
        }
    }

    #[test]
    fn segments_are_checked() {
        let range = |offset, len, unmap| Ok(Range { offset, len, unmap });
        for clear in [Clear::Discard, Clear::Zero] {
            assert_eq!(parse(clear, 3, 5, 0), range(1536, 2560, false));
            assert_eq!(parse(clear, SECTORS, 0, 0), range(SECTORS * SECTOR, 0, false));
            assert_eq!(parse(clear, SECTORS - 1, 1, 0), range((SECTORS - 1) * SECTOR, 512, false));
            assert_eq!(parse(clear, 0, 1, 2), Err(Refusal::Flags(2)));
            for (sector, count) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (1 << 55, 1)] {
                let bytes = u64::from(count) * SECTOR;
                assert_eq!(parse(clear, sector, count, 0), Err(Refusal::Range { sector, bytes }));
            }
            let long = clear.max_sectors() + 1;
            assert_eq!(parse(clear, 0, long, 0), Err(Refusal::Clear(long)));
        }
        assert_eq!(parse(Clear::Discard, 0, 1, 1), Err(Refusal::Flags(1)));
        assert_eq!(parse(Clear::Zero, 0, 1, 1), range(0, 512, true));
        assert_eq!(parse(Clear::Zero, 0, 1, 3), Err(Refusal::Flags(3)));
    }

    #[test]
    fn cleared_ranges_read_as_zeros_and_the_rest_stays() {
        // A tmpfs cannot zero a range by itself, so that zeros are written there.
        for folder in [std::env::temp_dir(), "/dev/shm".into()] {
            for (clear, unmap) in
                [(Clear::Discard, false), (Clear::Zero, false), (Clear::Zero, true)]
            {
                let disk = disk(tempfile::tempfile_in(&folder).expect("file"));
                let space = |disk: &Disk| disk.file.metadata().expect("metadata").blocks();
                let before = space(&disk);
                let ranges = [
                    Range { offset: 512, len: 300 << 10, unmap },
                    Range { offset: disk.size - 8192, len: 8192, unmap },
                    Range { offset: 0, len: 0, unmap },
                ];
                execute(&disk.file, clear, &ranges, true, None).expect("clear");
                let mut content = vec![0; disk.size as usize];
                disk.file.read_exact_at(&mut content, 0).expect("read");
                for (at, byte) in content.iter().enumerate() {
                    let at = at as u64;
                    let cleared = ranges.iter().any(|r| (r.offset..r.offset + r.len).contains(&at));
                    assert_eq!(*byte == 0, cleared, "{clear:?} {unmap} byte {at} in {folder:?}");
                }
                assert_eq!(disk.file.metadata().expect("metadata").len(), disk.size);
                let given_up = space(&disk) < before;
                assert_eq!(given_up, unmap || clear == Clear::Discard, "{clear:?} {unmap}");
            }
        }
    }

    proptest! {
        #[test]
        fn an_accepted_segment_is_on_the_disk(
            sector in prop_oneof![0..SECTORS * 2, any::<u64>()],
            count in prop_oneof![0..4096u32, any::<u32>()],
            flags in prop_oneof![Just(0), Just(1), any::<u32>()],
        ) {
            for clear in [Clear::Discard, Clear::Zero] {
                if let Ok(range) = parse(clear, sector, count, flags) {
                    prop_assert!(range.offset.checked_add(range.len).expect("end") <= SECTORS * SECTOR);
                    prop_assert_eq!(range.offset, sector * SECTOR);
                    prop_assert_eq!(range.len, u64::from(count) * SECTOR);
                }
            }
        }
    }
}
