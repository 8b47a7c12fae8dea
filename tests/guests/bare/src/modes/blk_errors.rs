//! Requests that must fail, and must do no more than fail.

use crate::boot::Boot;
use crate::heap::Heap;
use crate::virtio::blk::{Disk, IO_ERROR, Kind, OK, Options, UNSUPPORTED};
use crate::virtio::mmio::NEEDS_RESET;
use crate::virtio::queue::Segment;

/// A bad request: its name, the status it must get, its header and data.
struct Case {
    name: &'static str,
    status: u8,
    kind: u32,
    sector: u64,
    data: Option<(u64, u32, bool)>,
}

/// Sends them one by one, each followed by a good one.
pub fn run(boot: &Boot) {
    let mut heap = Heap::new(&boot.memory);
    let options = Options { segments: 4, ..Options::from_cmdline(boot) };
    let mut disk = Disk::open(boot, &mut heap, options);
    let data = disk.data(0).as_ptr() as u64;
    let end = disk.capacity;
    let (read, write) = (Kind::Read as u32, Kind::Write as u32);
    let (flush, get_id) = (Kind::Flush as u32, Kind::GetId as u32);
    let case = |name, status, kind, sector, data| Case { name, status, kind, sector, data };
    let cases = [
        case("read-past-end", IO_ERROR, read, end, Some((data, 512, true))),
        case("read-across-end", IO_ERROR, read, end - 1, Some((data, 1024, true))),
        case("write-past-end", IO_ERROR, write, end, Some((data, 512, false))),
        case("sector-overflow", IO_ERROR, read, u64::MAX, Some((data, 512, true))),
        case("byte-overflow", IO_ERROR, write, 1 << 55, Some((data, 512, false))),
        case("unknown-type", UNSUPPORTED, 0x1234, 0, Some((data, 512, true))),
        case("odd-length", IO_ERROR, read, 0, Some((data, 511, true))),
        case("no-data-read", IO_ERROR, read, 0, None),
        case("no-data-write", IO_ERROR, write, 0, None),
        case("no-data-get-id", IO_ERROR, get_id, 0, None),
        case("data-in-flush", IO_ERROR, flush, 0, Some((data, 512, false))),
        case("read-into-readable", IO_ERROR, read, 0, Some((data, 512, false))),
        case("write-from-writable", IO_ERROR, write, 0, Some((data, 512, true))),
        case("outside-memory", IO_ERROR, read, 0, Some((0xd000_0000, 512, true))),
        case("wraps-address", IO_ERROR, read, 0, Some((u64::MAX - 255, 512, true))),
    ];
    for bad in &cases {
        let header = disk.header(0, bad.kind, bad.sector);
        let status = disk.status_segment(0);
        match bad.data {
            Some((address, length, device_writes)) => {
                disk.prepare_raw(0, &[header, Segment { address, length, device_writes }, status]);
            }
            None => disk.prepare_raw(0, &[header, status]),
        }
        expect(&mut disk, bad.name, bad.status);
        disk.request(Kind::Read, 0, 512);
    }

    let mut header = disk.header(0, read, 0);
    header.length = 8;
    let status = disk.status_segment(0);
    let sector = Segment { address: data, length: 512, device_writes: true };
    disk.prepare_raw(0, &[header, sector, status]);
    expect(&mut disk, "short-header", IO_ERROR);
    disk.request(Kind::Read, 0, 512);

    if disk.read_only {
        disk.prepare(0, Kind::Write, 0, 512);
        expect(&mut disk, "write-to-read-only", IO_ERROR);
        disk.request(Kind::Read, 0, 512);
    }

    // An available index further ahead than the ring is long: the device must give up, say so, and
    // come back after a reset.
    let ahead = disk.queue().size() + 1;
    disk.queue().publish_nonsense(ahead);
    disk.transport().notify(0);
    while disk.transport().status() & NEEDS_RESET == 0 {}
    say!("blk-errors: poisoned-queue needs-reset");
    let mut disk = Disk::start(disk.transport(), &mut heap, options);
    disk.request(Kind::Read, 0, 512);
    say!("blk-errors: after-reset status={OK}");
}

fn expect(disk: &mut Disk, name: &str, status: u8) {
    disk.kick();
    let done = disk.wait();
    if done.status != status {
        crate::exit::fail(format_args!("{name}: status {}, not {status}", done.status));
    }
    say!("blk-errors: {name} status={status}");
}
