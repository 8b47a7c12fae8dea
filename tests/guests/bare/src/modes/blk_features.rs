//! Discard, write-zeroes and the cache mode, and what of them a disk must refuse.

use crate::boot::Boot;
use crate::heap::Heap;
use crate::pattern::{self, SECTOR};
use crate::virtio::blk::{Disk, IO_ERROR, Kind, OK, Options, UNSUPPORTED};

/// Where the configuration has the cache mode.
const WRITEBACK: u64 = 32;
/// Sectors that are written first.
const SPAN: u64 = 4096;
const UNMAP: u32 = 1;

/// Writes 2 MiB, clears parts of it, and checks that these are zeros and the rest is not.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options { buffer: 64 * SECTOR, depth: 1, ..Options::from_cmdline(boot) };
    let mut disk = Disk::open(boot, &mut heap, options);
    let transport = disk.transport();
    say!(
        "blk-features: clears={} discard={}x{} align={} zeroes={}x{} unmap={} physical={} min={}",
        disk.clears as u8,
        transport.config32(40),
        transport.config32(36),
        transport.config32(44),
        transport.config32(52),
        transport.config32(48),
        transport.config8(56),
        transport.config8(24),
        transport.config32(24) >> 16,
    );
    if !disk.clears {
        clear(&mut disk, "discard-of-read-only", Kind::Discard, &[(0, 8, 0)], IO_ERROR);
        clear(&mut disk, "zero-of-read-only", Kind::WriteZeroes, &[(0, 8, 0)], IO_ERROR);
        return;
    }
    fill(&mut disk);

    let (end, many) = (disk.capacity, [(0, 1, 0); 32]);
    let (discard, zero) = (Kind::Discard, Kind::WriteZeroes);
    clear(&mut disk, "discard-past-end", discard, &[(end, 1, 0)], IO_ERROR);
    clear(&mut disk, "discard-across-end", discard, &[(0, 8, 0), (end - 1, 2, 0)], IO_ERROR);
    clear(&mut disk, "discard-overflow", discard, &[(u64::MAX, 2, 0)], IO_ERROR);
    clear(&mut disk, "discard-unmap", discard, &[(0, 8, UNMAP)], UNSUPPORTED);
    clear(&mut disk, "discard-flags", discard, &[(0, 8, 0), (0, 8, 2)], UNSUPPORTED);
    clear(&mut disk, "discard-nothing", discard, &[], IO_ERROR);
    clear(&mut disk, "zero-past-end", zero, &[(end, 1, 0)], IO_ERROR);
    clear(&mut disk, "zero-flags", zero, &[(0, 8, 2)], UNSUPPORTED);
    clear(&mut disk, "zero-too-long", zero, &[(0, (1 << 16) + 1, 0)], IO_ERROR);
    clear(&mut disk, "zero-too-many", zero, &many[..5], IO_ERROR);
    check(&mut disk, &[]);

    clear(&mut disk, "discard", discard, &[(0, 1024, 0), (1536, 8, 0)], OK);
    clear(&mut disk, "zero", zero, &[(2048, 1024, 0), (3583, 1, 0)], OK);
    clear(&mut disk, "zero-unmap", zero, &[(3600, 200, UNMAP)], OK);
    check(&mut disk, &[(0, 1024), (1536, 8), (2048, 1024), (3583, 1), (3600, 200)]);
    clear(&mut disk, "discard-most", discard, &many, OK);

    for writeback in [0, 1, 0] {
        transport.set_config8(WRITEBACK, writeback);
        let found = transport.config8(WRITEBACK);
        if found != writeback {
            crate::exit::fail(format_args!("cache mode {found}, not {writeback}"));
        }
        say!("blk-features: writeback={found}");
        fill(&mut disk);
        check(&mut disk, &[]);
    }
    // A reset puts the cache mode back.
    let disk = Disk::start(transport, &mut heap, options);
    say!("blk-features: after-reset writeback={}", disk.transport().config8(WRITEBACK));
}

fn fill(disk: &mut Disk) {
    for sector in (0..SPAN).step_by(64) {
        pattern::fill(disk.data(0), sector, 1);
        disk.request(Kind::Write, sector, 64 * SECTOR);
    }
}

/// Checks that the span is as [`fill`] wrote it, but zero where it was cleared.
fn check(disk: &mut Disk, cleared: &[(u64, u64)]) {
    for first in (0..SPAN).step_by(64) {
        disk.data(0).fill(0xa5);
        disk.request(Kind::Read, first, 64 * SECTOR);
        for (sector, data) in (first..).zip(disk.data(0).chunks(SECTOR)) {
            if !cleared.iter().any(|(at, count)| (*at..at + count).contains(&sector)) {
                pattern::check(data, sector, 1);
            } else if data.iter().any(|byte| *byte != 0) {
                crate::exit::fail(format_args!("sector {sector} was cleared and is not zero"));
            }
        }
    }
}

/// One request over (sector, sectors, flags) ranges, whose status must be this.
fn clear(disk: &mut Disk, name: &str, kind: Kind, ranges: &[(u64, u32, u32)], wanted: u8) {
    for (place, (sector, count, flags)) in disk.data(0).chunks_mut(16).zip(ranges) {
        place[..8].copy_from_slice(&sector.to_le_bytes());
        place[8..12].copy_from_slice(&count.to_le_bytes());
        place[12..].copy_from_slice(&flags.to_le_bytes());
    }
    disk.prepare(0, kind, 0, ranges.len() * 16);
    disk.kick();
    let done = disk.wait();
    if done.status != wanted {
        crate::exit::fail(format_args!("{name}: status {}, not {wanted}", done.status));
    }
    say!("blk-features: {name} status={wanted}");
}
