//! Every rule for requests as one table, and random chains against what must always hold.

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor as Split;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::*;
use crate::blk::memory::Memory;
use crate::protocol::write_log::WriteLog;

const W: u16 = VRING_DESC_F_WRITE as u16;
const N: u16 = VRING_DESC_F_NEXT as u16;
const I: u16 = VRING_DESC_F_INDIRECT as u16;

/// Sectors of the disk in these tests.
const SECTORS: u64 = 100;
/// End of the lower region of memory, which ends at no page.
const LOW_END: u64 = 0x2_0000;
/// A second region right behind the first, so that a buffer may span both.
const ADJACENT: u64 = 0x1_0000;
const HEADER_AT: u64 = 0x4000;
const DATA_AT: u64 = 0x5000;
const STATUS_AT: u64 = 0x4100;
/// Descriptors of the queue; a chain may be as long.
const QUEUE: u16 = 256;

fn memory() -> Memory {
    Memory::from_ranges(&[
        (GuestAddress(0), LOW_END as usize),
        (GuestAddress(LOW_END), ADJACENT as usize),
    ])
    .expect("memory")
}

fn limits() -> Limits {
    Limits {
        sectors: SECTORS,
        read_only: false,
        size_max: None,
        discard: false,
        write_zeroes: false,
        failed: false,
    }
}

/// Address, length, flags and next of a descriptor.
type Raw = (u64, u32, u16, u16);
/// Address, length and flags of a descriptor; NEXT is added where one follows.
type Part = (u64, u32, u16);

fn put_header(memory: &Memory, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(HEADER_AT)).expect("header");
    memory.write_obj(sector, GuestAddress(HEADER_AT + 8)).expect("header");
}

/// Puts the parts into the descriptor table as they are.
fn put_raw(mock: &MockSplitQueue<'_, Memory>, descriptors: &[Raw]) {
    for (i, (address, len, flags, next)) in descriptors.iter().enumerate() {
        let descriptor = RawDescriptor::from(Split::new(*address, *len, *flags, *next));
        mock.desc_table().store(i as u16, descriptor).expect("descriptor");
    }
    mock.avail().ring().ref_at(0).expect("entry").store(0);
    mock.avail().idx().store(1);
}

/// What the parser makes of the chain at descriptor 0.
#[derive(Debug, PartialEq)]
enum Got {
    Broken(Broken),
    Refused(Refusal),
    Accepted(Operation, u64),
}

fn parse(memory: &Memory, limits: Limits, descriptors: &[Raw]) -> Got {
    let mock = MockSplitQueue::new(memory, QUEUE);
    put_raw(&mock, descriptors);
    let mut queue: Queue = mock.create_queue().expect("queue");
    queue.set_ready(true);
    let view = View::new(memory).expect("view");
    let chain = queue.iter(&view).expect("iterator").next().expect("chain");
    let mut parser = Parser::new(&view, limits);
    match parser.parse(chain) {
        Err(broken) => Got::Broken(broken),
        Ok(request) => match request.body {
            Err(refusal) => Got::Refused(refusal),
            Ok((operation, data)) => Got::Accepted(operation, total(data)),
        },
    }
}

/// Links the parts in order.
fn linked(parts: &[Part]) -> Vec<Raw> {
    let last = parts.len() - 1;
    let link = |(i, (address, len, flags)): (usize, &Part)| {
        if i < last {
            (*address, *len, flags | N, i as u16 + 1)
        } else {
            (*address, *len, *flags, 0)
        }
    };
    parts.iter().enumerate().map(link).collect()
}

const HEAD: Part = (HEADER_AT, 16, 0);
const STATUS: Part = (STATUS_AT, 1, W);

fn reader(len: u32) -> Part {
    (DATA_AT, len, 0)
}

fn writer(len: u32) -> Part {
    (DATA_AT, len, W)
}

#[test]
fn the_rules() {
    use super::Operation::{Flush, GetId, Read, Write};
    let accepted = Got::Accepted;
    let refused = Got::Refused;
    let broken = Got::Broken;
    let many = |n: usize| [vec![HEAD], vec![writer(512); n], vec![STATUS]].concat();
    let (read, write, flush, id) =
        (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID);

    let rules: Vec<(&str, u32, u64, Vec<Part>, Got)> = vec![
        ("a read", read, 3, vec![HEAD, writer(1024), STATUS], accepted(Read(1536), 1024)),
        ("a write", write, 3, vec![HEAD, reader(512), STATUS], accepted(Write(1536), 512)),
        ("a flush", flush, 0, vec![HEAD, STATUS], accepted(Flush, 0)),
        ("a flush's sector is ignored", flush, !0, vec![HEAD, STATUS], accepted(Flush, 0)),
        ("a get-id", id, 0, vec![HEAD, writer(20), STATUS], accepted(GetId, 20)),
        ("a short get-id", id, 0, vec![HEAD, writer(5), STATUS], accepted(GetId, 5)),
        // Framing is the driver's affair.
        (
            "a header in parts",
            read,
            0,
            vec![(HEADER_AT, 7, 0), (HEADER_AT + 7, 9, 0), writer(512), STATUS],
            accepted(Read(0), 512),
        ),
        (
            "header and data in one",
            write,
            0,
            vec![(HEADER_AT, 16 + 512, 0), STATUS],
            accepted(Write(0), 512),
        ),
        ("data and status in one", read, 0, vec![HEAD, writer(513)], accepted(Read(0), 512)),
        (
            "sectors cut up",
            read,
            0,
            vec![HEAD, writer(100), writer(412), STATUS],
            accepted(Read(0), 512),
        ),
        (
            "empty descriptors",
            read,
            0,
            vec![(0, 0, 0), HEAD, (0, 0, W), writer(512), (0, 0, W), STATUS],
            accepted(Read(0), 512),
        ),
        (
            "a buffer over two regions",
            read,
            0,
            vec![HEAD, (LOW_END - 8, 512, W), STATUS],
            accepted(Read(0), 512),
        ),
        ("100 segments", read, 0, many(100), accepted(Read(0), 51200)),
        ("no descriptor but the status", read, 0, vec![STATUS], refused(Refusal::Header)),
        // Status.
        ("no writable byte", write, 0, vec![HEAD, reader(512)], broken(Broken::NoStatus)),
        ("an empty status", read, 0, vec![HEAD, (STATUS_AT, 0, W)], broken(Broken::NoStatus)),
        (
            "a status outside memory",
            read,
            0,
            vec![HEAD, writer(512), (1 << 40, 1, W)],
            broken(Broken::NoStatus),
        ),
        (
            "a status half outside memory",
            flush,
            0,
            vec![HEAD, (LOW_END + ADJACENT - 1, 2, W)],
            broken(Broken::NoStatus),
        ),
        (
            "a status at the end of the address space",
            flush,
            0,
            vec![HEAD, (u64::MAX, 2, W)],
            broken(Broken::NoStatus),
        ),
        // Header.
        (
            "15 bytes of header",
            flush,
            0,
            vec![(HEADER_AT, 15, 0), STATUS],
            refused(Refusal::Header),
        ),
        (
            "a header outside memory",
            flush,
            0,
            vec![(1 << 40, 16, 0), STATUS],
            refused(Refusal::Header),
        ),
        (
            "data outside memory",
            write,
            0,
            vec![HEAD, (1 << 40, 512, 0), STATUS],
            refused(Refusal::Header),
        ),
        (
            "a writable buffer outside memory",
            read,
            0,
            vec![HEAD, (1 << 40, 512, W), STATUS],
            refused(Refusal::Address),
        ),
        (
            "readable behind writable",
            write,
            0,
            vec![HEAD, STATUS, reader(512)],
            refused(Refusal::Order),
        ),
        (
            "readable behind a bad writable",
            write,
            0,
            vec![HEAD, (1 << 40, 1, W), reader(512), STATUS],
            refused(Refusal::Order),
        ),
        // Types.
        ("an unknown type", 3, 0, vec![HEAD, writer(512), STATUS], refused(Refusal::Type(3))),
        ("an unknown type without data", 99, 0, vec![HEAD, STATUS], refused(Refusal::Type(99))),
        (
            "discard is not offered",
            11,
            0,
            vec![HEAD, reader(16), STATUS],
            refused(Refusal::Type(11)),
        ),
        // Data.
        ("a read of nothing", read, 0, vec![HEAD, STATUS], refused(Refusal::NoData)),
        ("a write of nothing", write, 0, vec![HEAD, STATUS], refused(Refusal::NoData)),
        ("a get-id of nothing", id, 0, vec![HEAD, STATUS], refused(Refusal::NoData)),
        (
            "a flush with data",
            flush,
            0,
            vec![HEAD, writer(512), STATUS],
            refused(Refusal::UnexpectedData),
        ),
        (
            "a flush with data to write",
            flush,
            0,
            vec![HEAD, reader(512), STATUS],
            refused(Refusal::UnexpectedData),
        ),
        (
            "part of a sector",
            read,
            0,
            vec![HEAD, writer(513), STATUS],
            refused(Refusal::PartSector(513)),
        ),
        (
            "part of a sector to write",
            write,
            0,
            vec![HEAD, reader(100), STATUS],
            refused(Refusal::PartSector(100)),
        ),
        (
            "a read into nothing writable",
            read,
            0,
            vec![HEAD, reader(512), STATUS],
            refused(Refusal::Direction),
        ),
        (
            "a write from nothing readable",
            write,
            0,
            vec![HEAD, writer(512), STATUS],
            refused(Refusal::Direction),
        ),
        (
            "a read that brings data",
            read,
            0,
            vec![HEAD, reader(512), writer(512), STATUS],
            refused(Refusal::Direction),
        ),
        (
            "a get-id that brings data",
            id,
            0,
            vec![HEAD, reader(20), STATUS],
            refused(Refusal::Direction),
        ),
        // Range.
        (
            "the last sector",
            read,
            99,
            vec![HEAD, writer(512), STATUS],
            accepted(Read(99 * 512), 512),
        ),
        (
            "behind the last sector",
            read,
            100,
            vec![HEAD, writer(512), STATUS],
            refused(Refusal::Range { sector: 100, bytes: 512 }),
        ),
        (
            "over the end",
            write,
            99,
            vec![HEAD, reader(1024), STATUS],
            refused(Refusal::Range { sector: 99, bytes: 1024 }),
        ),
        (
            "a sector that overflows",
            write,
            u64::MAX,
            vec![HEAD, reader(512), STATUS],
            refused(Refusal::Range { sector: u64::MAX, bytes: 512 }),
        ),
        (
            "an offset that overflows",
            read,
            u64::MAX / 512,
            vec![HEAD, writer(512), STATUS],
            refused(Refusal::Range { sector: u64::MAX / 512, bytes: 512 }),
        ),
    ];
    for (name, kind, sector, parts, want) in rules {
        let memory = memory();
        put_header(&memory, kind, sector);
        assert_eq!(parse(&memory, limits(), &linked(&parts)), want, "{name}");
    }
}

#[test]
fn the_order_of_the_rules() {
    // Each request breaks several rules; the first in the order of checks is named.
    let read_only = Limits { read_only: true, size_max: Some(1024), ..limits() };
    let cases: Vec<(u32, u64, Vec<Part>, Refusal)> = vec![
        (VIRTIO_BLK_T_OUT, 500, vec![(HEADER_AT, 15, 0), writer(2000), STATUS], Refusal::Header),
        (VIRTIO_BLK_T_OUT, 500, vec![HEAD, writer(2000), STATUS], Refusal::Segment(2000)),
        (99, 500, vec![HEAD, writer(2000), STATUS], Refusal::Segment(2000)),
        (VIRTIO_BLK_T_OUT, 500, vec![HEAD, STATUS], Refusal::NoData),
        (VIRTIO_BLK_T_OUT, 500, vec![HEAD, writer(600), STATUS], Refusal::PartSector(600)),
        (VIRTIO_BLK_T_OUT, 500, vec![HEAD, writer(512), STATUS], Refusal::ReadOnly),
        (VIRTIO_BLK_T_IN, 500, vec![HEAD, reader(512), STATUS], Refusal::Direction),
        (
            VIRTIO_BLK_T_IN,
            500,
            vec![HEAD, writer(512), STATUS],
            Refusal::Range { sector: 500, bytes: 512 },
        ),
    ];
    for (kind, sector, parts, want) in cases {
        let memory = memory();
        put_header(&memory, kind, sector);
        assert_eq!(parse(&memory, read_only, &linked(&parts)), Got::Refused(want));
    }
}

#[test]
fn segments_are_bounded_only_by_agreement() {
    let memory = memory();
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    let parts = linked(&[HEAD, writer(1024), writer(1536), STATUS]);
    let bounded = |size_max| parse(&memory, Limits { size_max, ..limits() }, &parts);
    assert_eq!(bounded(None), Got::Accepted(Operation::Read(0), 2560));
    assert_eq!(bounded(Some(1536)), Got::Accepted(Operation::Read(0), 2560));
    assert_eq!(bounded(Some(1535)), Got::Refused(Refusal::Segment(1536)));
}

#[test]
fn chains_that_do_not_end_are_broken() {
    let cases: [(&str, &[Raw]); 6] = [
        ("a loop", &[(HEADER_AT, 16, N, 1), (DATA_AT, 512, N | W, 0)]),
        ("a loop of one", &[(STATUS_AT, 1, N | W, 0)]),
        ("a link out of the table", &[(HEADER_AT, 16, N, 1), (STATUS_AT, 1, N | W, QUEUE)]),
        ("a table outside memory", &[(1 << 40, 64, I, 0)]),
        ("a table of odd size", &[(DATA_AT, 17, I, 0)]),
        ("an empty table", &[(DATA_AT, 0, I, 0)]),
    ];
    for (name, chain) in cases {
        let memory = memory();
        put_header(&memory, VIRTIO_BLK_T_FLUSH, 0);
        assert_eq!(parse(&memory, limits(), chain), Got::Broken(Broken::Endless), "{name}");
    }
}

/// Writes an indirect table at `DATA_AT` and returns the descriptor that names it.
fn table(memory: &Memory, parts: &[Part]) -> Raw {
    for (i, (address, len, flags, next)) in linked(parts).into_iter().enumerate() {
        let at = DATA_AT + 16 * i as u64;
        memory.write_obj(Split::new(address, len, flags, next), GuestAddress(at)).expect("table");
    }
    (DATA_AT, 16 * parts.len() as u32, I, 0)
}

#[test]
fn indirect_tables_hold_whole_requests() {
    let memory = memory();
    let into = (0x1_0000, 512, W);
    put_header(&memory, VIRTIO_BLK_T_IN, 1);
    let request = table(&memory, &[HEAD, into, STATUS]);
    assert_eq!(parse(&memory, limits(), &[request]), Got::Accepted(Operation::Read(512), 512));

    // As many segments as promised, and one more: with a status to say so.
    let full = [vec![HEAD], vec![into; SEG_MAX as usize], vec![STATUS]].concat();
    let wide = Limits { sectors: 1 << 20, ..limits() };
    let want = Got::Accepted(Operation::Read(512), 512 * u64::from(SEG_MAX));
    assert_eq!(parse(&memory, wide, &[table(&memory, &full)]), want);
    let over = [vec![HEAD], vec![into; SEG_MAX as usize + 1], vec![STATUS]].concat();
    let want = Got::Refused(Refusal::TooManyDescriptors);
    assert_eq!(parse(&memory, wide, &[table(&memory, &over)]), want);
    // Far too many are not followed to the end.
    let endless = [vec![HEAD], vec![(0x1_f000, 0, W); MAX_WALK], vec![STATUS]].concat();
    assert_eq!(parse(&memory, wide, &[table(&memory, &endless)]), Got::Broken(Broken::Endless));

    // A table inside a table is none.
    let nested = table(&memory, &[HEAD, (DATA_AT, 32, I | W), STATUS]);
    assert_eq!(parse(&memory, limits(), &[nested]), Got::Broken(Broken::Endless));
}

#[test]
fn a_parser_forgets_the_request_before() {
    let memory = memory();
    let mock = MockSplitQueue::new(&memory, QUEUE);
    let view = View::new(&memory).expect("view");
    let mut parser = Parser::new(&view, limits());
    put_header(&memory, VIRTIO_BLK_T_IN, 0);
    for parts in [
        &[HEAD, writer(512), STATUS][..],
        &[HEAD, (1 << 40, 1, W), STATUS],
        &[HEAD, writer(1024), STATUS],
    ] {
        put_raw(&mock, &linked(parts));
        let mut queue: Queue = mock.create_queue().expect("queue");
        queue.set_ready(true);
        let chain = queue.iter(&view).expect("iterator").next().expect("chain");
        let request = parser.parse(chain).expect("answerable");
        match request.body {
            Ok((_, data)) => assert_eq!(total(data), u64::from(parts[1].1)),
            Err(refusal) => assert_eq!(refusal, Refusal::Address),
        }
    }
}

fn any_descriptor() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        Just(HEADER_AT),
        Just(DATA_AT),
        Just(STATUS_AT),
        LOW_END - 600..LOW_END + 600,
        LOW_END + ADJACENT - 600..LOW_END + ADJACENT + 600,
        u64::MAX - 600..=u64::MAX,
        any::<u64>(),
    ];
    let len = prop_oneof![
        Just(0u32),
        Just(1),
        Just(16),
        Just(512),
        Just(513),
        Just(4096),
        0u32..2000,
        any::<u32>()
    ];
    let flags =
        prop_oneof![4 => Just(N), 4 => Just(N | W), 2 => Just(W), 1 => Just(I), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..6, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    /// Whatever the chain, an accepted request lies on the disk and in guest memory.
    #[test]
    fn accepted_requests_are_in_bounds(
        descriptors in prop::collection::vec(any_descriptor(), 1..6),
        kind in prop_oneof![
            Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()
        ],
        sector in prop_oneof![0u64..120, any::<u64>()],
        read_only in any::<bool>(),
    ) {
        let memory = memory();
        put_header(&memory, kind, sector);
        let limits = Limits { read_only, discard: true, write_zeroes: true, ..limits() };
        if let Got::Accepted(operation, bytes) = parse(&memory, limits, &descriptors) {
            match operation {
                Operation::Read(offset) => {
                    prop_assert!(bytes > 0 && bytes.is_multiple_of(512));
                    prop_assert!(offset + bytes <= SECTORS * 512);
                }
                Operation::Write(offset) => {
                    prop_assert!(!read_only && bytes > 0 && bytes.is_multiple_of(512));
                    prop_assert!(offset + bytes <= SECTORS * 512);
                }
                Operation::Flush => prop_assert_eq!(bytes, 0),
                Operation::GetId => prop_assert!(bytes > 0),
                Operation::Clear(_) => prop_assert!(!read_only && bytes == 0),
            }
        }
    }

    /// However a good request is cut into descriptors, it is the same request.
    #[test]
    fn framing_does_not_matter(
        cuts in prop::collection::btree_set(1u32..16 + 1024, 0..6),
        write in any::<bool>(),
    ) {
        let memory = memory();
        let kind = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        put_header(&memory, kind, 2);
        // For a write one run of header and data, for a read one of data and status.
        let (len, flags) = if write { (16 + 1024, 0) } else { (1025, W) };
        let start = if write { HEADER_AT } else { DATA_AT };
        let cuts: Vec<u32> = cuts.into_iter().filter(|cut| *cut < len).collect();
        let edges = [vec![0], cuts, vec![len]].concat();
        let run = edges.windows(2).map(|e| (start + u64::from(e[0]), e[1] - e[0], flags));
        let mut parts: Vec<Part> = run.collect();
        if write { parts.push((0x8000, 1, W)) } else { parts.insert(0, HEAD) }
        let operation = if write { Operation::Write(1024) } else { Operation::Read(1024) };
        prop_assert_eq!(parse(&memory, limits(), &linked(&parts)), Got::Accepted(operation, 1024));
    }
}

/// Of a process that dies while it writes nothing more is heard.
#[test]
fn what_is_going_to_be_written_is_marked_before() {
    let memory = memory();
    let (log, _fd) = WriteLog::new(LOW_END).expect("log");
    let view = View::logged(&memory, &log);
    for (kind, written) in [(VIRTIO_BLK_T_IN, 0b11_0000u64), (VIRTIO_BLK_T_OUT, 0b1_0000)] {
        put_header(&memory, kind, 0);
        let way = if kind == VIRTIO_BLK_T_IN { W } else { 0 };
        let parts = [(HEADER_AT, 16, N, 1), (DATA_AT, 512, N | way, 2), (STATUS_AT, 1, W, 0)];
        let mock = MockSplitQueue::new(&memory, QUEUE);
        put_raw(&mock, &parts);
        let mut queue: Queue = mock.create_queue().expect("queue");
        queue.set_ready(true);
        let chain = queue.iter(&view).expect("iterator").next().expect("chain");
        assert!(Parser::new(&view, limits()).parse(chain).expect("whole").body.is_ok());
        let mut pages = 0;
        log.take(|_, bits| pages |= bits);
        assert_eq!(pages, written, "{kind}");
    }
}
