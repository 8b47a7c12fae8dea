//! The registers as a driver uses them, in front of a real block device on a
//! thread of this process, and of back ends that do not behave.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cellblock_devices::blk;
use cellblock_devices::protocol::BlkStart;
use cellblock_devices::protocol::counters::new_counters;
use cellblock_wire::Channel;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::cell::blk::first_cache_mode;
use crate::event::event;
use crate::transport::front_end::Needs;
use crate::transport::script::{self, Peer};

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const NEEDS: Needs = Needs { config_len: 60, advice: &[], least: 1, most: 1 };
const DISK: u64 = 1 << 20;

/// A device, and the front end's other half of the connection.
struct Rig {
    device: Arc<VirtioMmio>,
    call: Arc<EventFd>,
    kick: Arc<EventFd>,
    err: Arc<EventFd>,
    ram: GuestRam,
    back: Option<(JoinHandle<()>, Channel)>,
}

impl Rig {
    /// In front of a real block device of [`DISK`] bytes.
    fn blk(vcpus: usize) -> Rig {
        let image = tempfile::tempfile().expect("image");
        image.set_len(DISK).expect("size");
        let start = BlkStart {
            read_only: false,
            size: DISK,
            serial: "test".into(),
            queues: 1,
            poll_us: 0,
            throttle: Default::default(),
            engine: Default::default(),
            failed: false,
            cow: false,
        };
        let (near, far) = UnixStream::pair().expect("pair");
        let (cell, cell_end) = Channel::pair().expect("channel");
        let blk = blk::prepare(start, vec![image.into(), new_counters().expect("page")], far)
            .expect("prepare");
        let thread = std::thread::spawn(move || drop(blk.serve(&cell_end)));
        let ram = GuestRam::new(32 << 20).expect("ram");
        let front_end =
            FrontEnd::start("disk0", near, NEEDS, ram.clone(), || Ok(())).expect("front end");
        let info = front_end.wait(&front_end.open()).expect("negotiation");
        let mut rig = Rig::new(front_end, info, ram, vcpus);
        rig.back = Some((thread, cell));
        rig
    }

    /// In front of a back end that has only negotiated, and says from then on what the
    /// test wants.
    fn scripted(vcpus: usize) -> (Rig, Peer) {
        let (near, far) = UnixStream::pair().expect("pair");
        let mut far = Peer(far);
        let ram = GuestRam::new(32 << 20).expect("ram");
        let front_end =
            FrontEnd::start("disk0", near, NEEDS, ram.clone(), || Ok(())).expect("front end");
        let answer = front_end.open();
        let config = loop {
            let message = far.next().expect("negotiation");
            far.answer(&message, script::FEATURES, script::PROTOCOL, 0);
            if message.request == script::GET_CONFIG {
                break message.body;
            }
        };
        let info = front_end.wait(&answer).expect("negotiation");
        assert_eq!(info.config, config[12..]);
        (Rig::new(front_end, info, ram, vcpus), far)
    }

    fn new(front_end: FrontEnd, info: DeviceInfo, ram: GuestRam, vcpus: usize) -> Rig {
        let [kick, call, err] = [(); 3].map(|()| Arc::new(event().expect("event")));
        let wiring = Wiring { kicks: vec![kick.clone()], call: call.clone(), err: err.clone() };
        let (id, adapt) = ("disk0".into(), first_cache_mode);
        let identity = Identity { id, device_type: VIRTIO_ID_BLOCK, info, writable: 32..33, adapt };
        let device = VirtioMmio::new(identity, front_end, wiring, ram.clone(), Kicks::new(vcpus));
        Rig { device: Arc::new(device), call, kick, err, ram, back: None }
    }

    fn read(&self, offset: u32) -> u32 {
        let mut data = [0xee; 4];
        assert!(matches!(self.device.read(0, offset.into(), &mut data), Outcome::Done));
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u32, value: u32) {
        let outcome = self.device.write(0, offset.into(), &value.to_le_bytes());
        assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    }

    fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    fn add_status(&self, bits: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, self.status() | bits);
    }

    fn features(&self) -> u64 {
        let half = |select| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    fn accept(&self, features: u64) {
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// Up to FEATURES_OK.
    fn negotiate(&self, features: u64) {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.accept(features);
        self.add_status(FEATURES_OK);
    }

    fn queue(&self, size: u32, desc: u64, avail: u64, used: u64) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        for (low, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, desc),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// All the way to DRIVER_OK with a good queue.
    fn drive(&self) {
        self.negotiate(VERSION_1);
        self.ram.memory().write_slice(&[0; 0x40], GuestAddress(0x2000)).expect("avail");
        self.ram.memory().write_slice(&[0; 0x80], GuestAddress(0x3000)).expect("used");
        self.queue(8, 0x1000, 0x2000, 0x3000);
        self.add_status(DRIVER_OK);
    }

    fn interrupted(&self) -> bool {
        self.call.read().is_ok()
    }

    /// Sends a flush as a driver does, and waits until it is used.
    fn flush_works(&self) -> bool {
        let memory = self.ram.memory();
        let at = GuestAddress;
        memory
            .write_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], at(0x4000))
            .expect("header");
        memory.write_obj(0xffu8, at(0x5000)).expect("status");
        let descriptor = |n: u64, address: u64, len: u32, flags: u16, next: u16| {
            let place = 0x1000 + 16 * n;
            memory.write_obj(address, at(place)).expect("descriptor");
            memory.write_obj(len, at(place + 8)).expect("descriptor");
            memory.write_obj(flags, at(place + 12)).expect("descriptor");
            memory.write_obj(next, at(place + 14)).expect("descriptor");
        };
        descriptor(0, 0x4000, 16, 1, 1);
        descriptor(1, 0x5000, 1, 2, 0);
        memory.write_obj(1u16, at(0x2002)).expect("avail index");
        self.kick.write(1).expect("kick");
        let end = Instant::now() + Duration::from_secs(5);
        while memory.read_obj::<u16>(at(0x3002)).expect("used") == 0 {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        memory.read_obj::<u8>(at(0x5000)).expect("status") == 0
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.front_end.abort();
        if let Some((thread, cell)) = self.back.take() {
            drop(cell);
            let _ = thread.join(); // a test that failed has said why
        }
    }
}

#[test]
fn the_device_introduces_itself() {
    let rig = Rig::blk(1);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_MAGIC_VALUE), u32::from_le_bytes(*b"virt"));
    assert_eq!(rig.read(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_VENDOR_ID).to_le_bytes(), *b"CBLL");
    assert_eq!(rig.status(), 0);
    for select in [1, 2, u32::MAX] {
        rig.write(reg::VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no queue {select}");
        assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    }
    rig.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
    // Registers that are only written, those of other versions, and none at all.
    for offset in [0x08c, reg::VIRTIO_MMIO_QUEUE_NOTIFY, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0xf8] {
        assert_eq!(rig.read(offset), 0, "{offset:#x}");
    }
    // No shared memory: virtio 1.2 section 4.2.2.
    assert_eq!(rig.read(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_SHM_BASE_HIGH), u32::MAX);
}

#[test]
fn features_are_what_a_guest_may_have() {
    let rig = Rig::blk(1);
    let features = rig.features();
    assert_ne!(features & VERSION_1, 0);
    assert_ne!(features & FLUSH, 0);
    assert_eq!(features & (1 << 30), 0, "protocol features are no guest's business");
    rig.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn the_configuration_is_read_in_any_width() {
    let rig = Rig::blk(1);
    let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
    let mut capacity = [0; 8];
    assert!(matches!(rig.device.read(0, config, &mut capacity), Outcome::Done));
    assert_eq!(u64::from_le_bytes(capacity), DISK / 512);
    let mut bytes = [0; 8];
    for (n, byte) in bytes.iter_mut().enumerate() {
        let byte = std::slice::from_mut(byte);
        assert!(matches!(rig.device.read(0, config + n as u64, byte), Outcome::Done));
    }
    assert_eq!(bytes, capacity);
    // Across its end and beyond.
    for offset in [u64::from(NEEDS.config_len) - 2, u64::from(NEEDS.config_len), WINDOW - 0x108] {
        let mut data = [0xee; 8];
        assert!(matches!(rig.device.read(0, config + offset, &mut data), Outcome::Done));
        assert_eq!(data[2..], [0; 6], "at {offset:#x}");
    }
    // Nothing of it can be written but the cache mode, by a driver, until the reset.
    let mode = || {
        let mut mode = [0xee];
        assert!(matches!(rig.device.read(0, config + 32, &mut mode), Outcome::Done));
        mode[0]
    };
    let set = |value| {
        assert!(matches!(rig.device.write(0, config + 32, &[value]), Outcome::Done));
        mode()
    };
    assert_eq!(set(0), 1, "without a driver");
    rig.negotiate(VERSION_1 | FLUSH | 1 << 11);
    assert_eq!((set(0), set(1), set(0)), (0, 1, 0));
    rig.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(mode(), 1);
    // One that cannot flush has no cache to begin with.
    rig.negotiate(VERSION_1 | 1 << 11);
    assert_eq!((mode(), set(1), set(0)), (0, 1, 0));
    rig.negotiate(VERSION_1 | FLUSH | 1 << 11);
    assert_eq!(mode(), 1);
    assert!(matches!(rig.device.write(0, config, &[0xff; 4]), Outcome::Done));
    assert_eq!(rig.read(reg::VIRTIO_MMIO_CONFIG), (DISK / 512) as u32);
}

#[test]
fn registers_are_accessed_as_aligned_words_only() {
    let rig = Rig::blk(1);
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (1, 4)] {
        let mut data = vec![0xee; len];
        assert!(matches!(rig.device.read(0, offset, &mut data), Outcome::Done));
        assert_eq!(data, vec![0; len], "{len} bytes at {offset:#x}");
    }
    let status = u64::from(reg::VIRTIO_MMIO_STATUS);
    for data in [&[1u8][..], &[1, 0], &[1, 0, 0, 0, 0, 0, 0, 0]] {
        assert!(matches!(rig.device.write(0, status, data), Outcome::Done));
    }
    assert!(matches!(rig.device.write(0, status + 2, &[1, 0, 0, 0]), Outcome::Done));
    assert_eq!(rig.status(), 0);
}

#[test]
fn features_ok_is_refused_where_the_features_are_not() {
    let rig = Rig::blk(1);
    let offered = rig.features();
    rig.negotiate(offered & !VERSION_1);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER, "a legacy driver");
    rig.negotiate(offered | 1 << 40);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER, "a feature nobody offered");
    // It may think again.
    rig.accept(VERSION_1);
    rig.add_status(FEATURES_OK);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    // Now they stand, and DRIVER_OK works with what was agreed.
    rig.accept(u64::MAX);
    rig.queue(8, 0x1000, 0x2000, 0x3000);
    rig.add_status(DRIVER_OK);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn a_driver_that_keeps_the_order_is_served_and_can_start_over() {
    let rig = Rig::blk(1);
    for round in 0..3 {
        rig.drive();
        assert_eq!(rig.status(), 0xf, "round {round}");
        assert!(rig.flush_works(), "round {round}");
        assert!(rig.interrupted(), "round {round}");
        rig.write(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(rig.status(), 0);
        assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "a reset takes the queues back");
    }
}

#[test]
fn status_bits_are_only_ever_added() {
    let rig = Rig::blk(1);
    rig.drive();
    // Taking DRIVER_OK back and giving it again would set a live queue up twice.
    rig.write(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(rig.status(), 0xf);
    rig.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    assert!(rig.flush_works());
    // NEEDS_RESET is the device's to set, and there are eight bits.
    rig.write(reg::VIRTIO_MMIO_STATUS, 0xffff_ff00 | NEEDS_RESET | 0xf);
    assert_eq!(rig.status(), 0xf);
    // FAILED is the driver's.
    rig.add_status(128);
    assert_eq!(rig.status(), 0x8f);
}

#[test]
fn driver_ok_without_features_ok_is_not_taken() {
    let rig = Rig::blk(1);
    rig.write(reg::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn queues_are_set_up_between_features_ok_and_driver_ok_only() {
    let rig = Rig::blk(1);
    let ready = || rig.read(reg::VIRTIO_MMIO_QUEUE_READY);
    rig.queue(8, 0x1000, 0x2000, 0x3000);
    assert_eq!(ready(), 0, "before anything");
    rig.negotiate(VERSION_1);
    rig.write(reg::VIRTIO_MMIO_QUEUE_READY, 2);
    assert_eq!(ready(), 0, "only 1 makes it ready");
    rig.queue(8, 0x1000, 0x2000, 0x3000);
    assert_eq!(ready(), 1);
    // A queue that is ready stays where it is until it is taken back.
    rig.write(reg::VIRTIO_MMIO_QUEUE_NUM, 7);
    rig.add_status(DRIVER_OK);
    assert_eq!(rig.status(), 0xf);
    rig.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(ready(), 1, "while it is live");
}

#[test]
fn a_queue_no_device_may_be_given_needs_a_reset() {
    let rig = Rig::blk(1);
    let beyond = 32 << 20;
    for (size, desc, avail, used) in [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x2000, 0x3000),
        (0x1_0008, 0x1000, 0x2000, 0x3000),
        (8, 0x1008, 0x2000, 0x3000),
        (8, beyond, 0x2000, 0x3000),
        (8, 0x1000, u64::MAX - 1, 0x3000),
        (8, 0x1000, 0x2000, 1 << 32),
    ] {
        rig.negotiate(VERSION_1);
        rig.queue(size, desc, avail, used);
        rig.add_status(DRIVER_OK);
        let what = format!("{size} {desc:#x} {avail:#x} {used:#x}");
        assert_eq!(rig.status(), 0xf | NEEDS_RESET, "{what}");
        assert!(rig.interrupted(), "{what}");
    }
    rig.negotiate(VERSION_1);
    rig.add_status(DRIVER_OK);
    assert_eq!(rig.status(), 0xf | NEEDS_RESET, "no queue at all");
    rig.add_status(DRIVER_OK);
    assert_eq!(rig.status(), 0xf | NEEDS_RESET, "nothing but a reset helps");
    rig.drive();
    assert_eq!(rig.status(), 0xf);
    assert!(rig.flush_works());
}

#[test]
fn needs_reset_is_told_by_a_configuration_interrupt_until_acknowledged() {
    let rig = Rig::blk(1);
    rig.drive();
    let generation = rig.read(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), reg::VIRTIO_MMIO_INT_VRING);

    assert!(rig.device.gave_up());
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    assert!(rig.interrupted());
    assert_ne!(rig.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), generation);
    let both = reg::VIRTIO_MMIO_INT_VRING | reg::VIRTIO_MMIO_INT_CONFIG;
    assert_eq!(rig.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), both);
    rig.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, reg::VIRTIO_MMIO_INT_VRING);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), both);
    rig.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, both);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), reg::VIRTIO_MMIO_INT_VRING);
}

#[test]
fn only_a_driver_that_runs_is_told_and_only_once() {
    let rig = Rig::blk(1);
    rig.drive();
    assert!(rig.device.gave_up());
    let generation = rig.read(reg::VIRTIO_MMIO_CONFIG_GENERATION);
    assert!(!rig.device.gave_up());
    assert_eq!(rig.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), generation);
    // The driver was faster than the main loop.
    rig.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert!(!rig.device.gave_up());
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_queue_whose_ring_is_broken_asks_for_a_reset_and_gets_over_it() {
    let rig = Rig::blk(1);
    rig.drive();
    // An avail index further ahead than the queue is long.
    rig.ram.memory().write_obj(999u16, GuestAddress(0x2002)).expect("avail");
    rig.kick.write(1).expect("kick");
    let end = Instant::now() + Duration::from_secs(5);
    while rig.err.read().is_err() {
        assert!(Instant::now() < end, "the device noticed nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(rig.device.gave_up());
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    rig.drive();
    assert_eq!(rig.status(), 0xf);
    assert!(rig.flush_works());
}

#[test]
fn a_device_whose_process_died_needs_a_reset_that_does_not_help() {
    let mut rig = Rig::blk(1);
    rig.drive();
    let _ = rig.call.read();
    let (thread, cell) = rig.back.take().expect("back end");
    drop(cell); // the VMM's end: the process ends
    thread.join().expect("no panic");
    rig.device.lost();
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    assert!(rig.interrupted());
    rig.drive();
    assert_eq!(rig.status(), 0xf | NEEDS_RESET, "there is nobody to serve it");
}

#[test]
fn a_vcpu_that_waits_for_its_process_is_kicked_free_and_goes_on_later() {
    let (rig, mut far) = Rig::scripted(2);
    rig.negotiate(VERSION_1);
    rig.queue(8, 0x1000, 0x2000, 0x3000);
    let device = rig.device.clone();
    let status = u64::from(reg::VIRTIO_MMIO_STATUS);
    let write = move |vcpu| device.write(vcpu, status, &0xfu32.to_le_bytes());

    let (first, waits) = (write.clone(), std::thread::spawn);
    let vcpu = waits(move || first(0));
    far.behave_until(script::SET_VRING_ENABLE);
    rig.device.kick(1);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!vcpu.is_finished(), "another vCPU's kick is none of its business");
    // While it waits, the others can use the device's registers and change nothing
    // the device is being told.
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    rig.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(rig.read(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    assert!(matches!(write(1), Outcome::Done), "the later of two writers loses");

    rig.device.kick(0);
    assert!(matches!(vcpu.join().expect("no panic"), Outcome::Retry));
    // The same access again goes on waiting; the process dies meanwhile.
    assert!(rig.device.gave_up(), "a queue given up while it starts");
    let again = write.clone();
    let vcpu = std::thread::spawn(move || again(0));
    std::thread::sleep(Duration::from_millis(20));
    rig.device.lost();
    assert!(matches!(vcpu.join().expect("no panic"), Outcome::Done));
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    assert!(rig.interrupted());
}

#[test]
fn a_process_that_stays_silent_costs_one_deadline() {
    let (rig, far) = Rig::scripted(1);
    rig.negotiate(VERSION_1);
    rig.queue(8, 0x1000, 0x2000, 0x3000);
    let start = Instant::now();
    rig.add_status(DRIVER_OK);
    let took = start.elapsed();
    assert!(took >= DEADLINE && took < 2 * DEADLINE, "{took:?}");
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    // It was cut off, so the next attempt fails at once.
    rig.drive();
    assert!(start.elapsed() < 2 * DEADLINE);
    assert_eq!(rig.status(), 0xf | NEEDS_RESET);
    drop(far);
}

#[test]
fn an_error_event_that_its_process_emptied_blocks_nobody() {
    let rig = Rig::blk(1);
    rig.drive();
    // What a device process can do to an open file it shares with us.
    let fd = rig.device.err_event();
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_RDWR)).expect("flags");
    let device = rig.device.clone();
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(device.gave_up()));
    assert_eq!(wait.recv_timeout(Duration::from_secs(5)), Ok(true));
}

/// Random registers written by two vCPUs at once, most of them those that bring a
/// device up and reset it, while its process serves and once it is gone.
#[test]
fn no_order_of_registers_leaves_an_access_without_an_end() {
    let rig = Rig::blk(2);
    let end = Instant::now() + Duration::from_secs(2);
    let guest = |vcpu: u64| {
        let device = rig.device.clone();
        std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15 ^ vcpu;
            let mut started = 0;
            while Instant::now() < end {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let pick = (random >> 16) as usize;
                let (offset, value) = match random >> 60 {
                    0..6 => (0x70, [0, 1, 3, 0xb, 0xf, 0x4f][pick % 6]),
                    6..8 => (0x44, pick as u32 & 1),
                    8 => (0x38, 16 << (pick % 6)),
                    9 => (0x24, pick as u32 & 1),
                    10 => (0x20, if pick.is_multiple_of(4) { pick as u32 } else { 1 }),
                    11 => ([0x80, 0x90, 0xa0][pick % 3], (pick as u32) << 4 & 0xffff),
                    _ => (random >> 8 & 0xfc, pick as u32),
                };
                while device.write(vcpu as usize, offset, &value.to_le_bytes()) == Outcome::Retry {}
                let mut data = vec![0; pick % 9];
                let _ = device.read(vcpu as usize, random >> 40 & 0xfff, &mut data);
                started += u32::from(device.read_register(0x70) & DRIVER_OK != 0);
            }
            started
        })
    };
    let guests = [guest(0), guest(1)];
    std::thread::sleep(Duration::from_millis(1500));
    rig.device.lost();
    let started: u32 = guests.into_iter().map(|guest| guest.join().expect("no panic")).sum();
    assert!(rig.device.lock().pending.is_none());
    assert!(started > 0, "the device was never started: the test proves nothing");
}
