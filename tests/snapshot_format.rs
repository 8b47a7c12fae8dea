//! Snapshots on disk: written, read, damaged in every way, and refused.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cellblock::snapshot::format::{
    Base, CHUNK, Chain, Contents, Fault, FormatError, MAX_CHAIN, PAGE, Snapshot, WriteError,
    Writer, describe, merge,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

const CHUNKS: usize = 8;
const MEMORY: u64 = (CHUNKS * CHUNK) as u64;
const STATE: &[u8] = &[0x5a; 5000];

/// Guest RAM with a few pages in some chunks.
fn ram() -> File {
    let ram = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    ram.set_len(MEMORY).unwrap();
    for page in [0, 1, 5, 63, 64, 70, 200, 511] {
        ram.write_all_at(&pattern(page, 1), (page * PAGE) as u64).unwrap();
    }
    // Touched, but zero.
    ram.write_all_at(&[0; PAGE], (300 * PAGE) as u64).unwrap();
    ram
}

fn pattern(page: usize, round: u64) -> Vec<u8> {
    let mut x = page as u64 * 0x9e37_79b9_7f4a_7c15 + round;
    let word = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    std::iter::repeat_with(word).take(PAGE / 8).flatten().collect()
}

const CONTENTS: Contents = Contents { memory: MEMORY, vcpus: 2, live: false };

fn write(target: &Path, ram: &File) {
    let mut writer = Writer::create(target, CONTENTS, None).unwrap();
    writer.copy_all(ram.as_fd()).unwrap();
    writer.state(STATE).unwrap();
    writer.commit().unwrap();
}

/// A directory with a snapshot `one`.
fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    write(&one, &ram());
    (dir, one)
}

/// What a restore without laziness does: everything is read.
fn verify(path: &Path) -> Result<(), FormatError> {
    Chain::open(path)?.verify_all(|_, _| {})
}

fn contents(chain: &Chain) -> Vec<u8> {
    let mut all = vec![0xee; MEMORY as usize];
    for (index, chunk) in all.chunks_exact_mut(CHUNK).enumerate() {
        chain.read_chunk(index, chunk).unwrap();
    }
    all
}

fn bytes_of(ram: &File) -> Vec<u8> {
    let mut all = vec![0; MEMORY as usize];
    ram.read_exact_at(&mut all, 0).unwrap();
    all
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn cellblock(command: &str, path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cellblock")).arg(command).arg(path).output().unwrap()
}

/// `verify` says no: one line and status 1. Returns the line.
#[track_caller]
fn refused(path: &Path) -> String {
    let output = cellblock("verify", path);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with("cellblock: error: snapshot "), "{line}");
    assert!(output.stdout.is_empty());
    line
}

#[test]
fn what_was_written_is_read_and_zeros_cost_nothing() {
    let (dir, one) = place();
    verify(&one).unwrap();
    let chain = Chain::open(&one).unwrap();
    assert_eq!(contents(&chain), bytes_of(&ram()));
    assert_eq!(chain.snapshot().state().unwrap(), STATE);
    let zero: Vec<usize> = (0..CHUNKS).filter(|index| chain.is_zero(*index)).collect();
    assert_eq!(zero, [2, 4, 5, 6]);
    let used = fs::metadata(one.join("memory")).unwrap().blocks() * 512;
    assert!(used <= 10 * PAGE as u64, "{used} bytes used for 8 pages and the table");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something is left");
}

#[test]
fn rounds_leave_what_was_there_last() {
    let dir = tempfile::tempdir().unwrap();
    let (target, ram) = (dir.path().join("live"), ram());
    let mut writer = Writer::create(&target, Contents { live: true, ..CONTENTS }, None).unwrap();
    writer.copy_all(ram.as_fd()).unwrap();
    // Changed, new, and zeroed pages of chunks with data and without.
    let mut dirty = [0; CHUNKS];
    for (page, round) in [(1, 2), (2, 2), (130, 2), (300, 2)] {
        ram.write_all_at(&pattern(page, round), (page * PAGE) as u64).unwrap();
        dirty[page / 64] |= 1 << (page % 64);
    }
    for page in [5, 511] {
        ram.write_all_at(&[0; PAGE], (page * PAGE) as u64).unwrap();
        dirty[page / 64] |= 1 << (page % 64);
    }
    writer.copy_pages(ram.as_fd(), &dirty).unwrap();
    writer.state(STATE).unwrap();
    let manifest = writer.commit().unwrap();
    assert!(manifest.live);
    verify(&target).unwrap();
    assert_eq!(contents(&Chain::open(&target).unwrap()), bytes_of(&ram));
}

#[test]
fn a_chain_of_diffs_is_its_last_and_survives_a_move() {
    let (dir, one) = place();
    let ram = ram();
    let mut parent = one;
    for round in 2..5 {
        let mut dirty = [0; CHUNKS];
        for page in [round, 64, 300 + round] {
            ram.write_all_at(&pattern(page, round as u64), (page * PAGE) as u64).unwrap();
            dirty[page / 64] |= 1 << (page % 64);
        }
        ram.write_all_at(&[0; PAGE], (round * 64 * PAGE) as u64).unwrap();
        dirty[round] |= 1;
        let target = dir.path().join(format!("diff{round}"));
        let base = Base::of(&Chain::open(&parent).unwrap(), &target).unwrap();
        let mut writer = Writer::create(&target, CONTENTS, Some(base)).unwrap();
        writer.copy_pages(ram.as_fd(), &dirty).unwrap();
        writer.state(format!("state {round}").as_bytes()).unwrap();
        writer.commit().unwrap();
        parent = target;
    }
    let chain = Chain::open(&parent).unwrap();
    assert_eq!(chain.links().len(), 4);
    assert_eq!(contents(&chain), bytes_of(&ram));
    assert_eq!(chain.snapshot().state().unwrap(), b"state 4");
    chain.verify_all(|_, _| {}).unwrap();

    let flat = dir.path().join("flat");
    let manifest = merge(&chain, &flat, Arc::default(), |_, _| {}).unwrap();
    assert_eq!((manifest.parent, manifest.vcpus), (None, 2));
    assert_ne!(manifest.id, chain.manifest().id);

    let elsewhere = tempfile::tempdir().unwrap();
    for name in ["one", "diff2", "diff3", "diff4"] {
        copy_dir(&dir.path().join(name), &elsewhere.path().join(name));
    }
    verify(&elsewhere.path().join("diff4")).unwrap();
    fs::rename(&flat, elsewhere.path().join("flat")).unwrap();
    let flat = Chain::open(&elsewhere.path().join("flat")).unwrap();
    assert_eq!((flat.links().len(), contents(&flat)), (1, bytes_of(&ram)));
    assert_eq!(flat.snapshot().state().unwrap(), b"state 4");
    flat.verify_all(|_, _| {}).unwrap();
    // Another snapshot in the place of one of the chain is not taken for it.
    fs::remove_dir_all(elsewhere.path().join("one")).unwrap();
    write(&elsewhere.path().join("one"), &ram);
    let wrong = verify(&elsewhere.path().join("diff4")).unwrap_err();
    assert!(matches!(wrong.fault, Fault::WrongParent { .. }), "{wrong:?}");
    fs::remove_dir_all(elsewhere.path().join("one")).unwrap();
    assert!(refused(&elsewhere.path().join("diff4")).contains("opening its parent"));
}

/// A diff to the end of the longest chain that is followed would be one that nobody can read.
#[test]
fn no_chain_becomes_longer_than_one_is_followed() {
    let (dir, mut last) = place();
    let link = |n: usize| dir.path().join(format!("link{n}"));
    let mut links = 1;
    let error = loop {
        let base = match Base::of(&Chain::open(&last).unwrap(), &link(links)) {
            Ok(base) => base,
            Err(error) => break error,
        };
        last = link(links);
        let mut writer = Writer::create(&last, CONTENTS, Some(base)).unwrap();
        writer.state(STATE).unwrap();
        writer.commit().unwrap();
        links += 1;
        verify(&last).unwrap();
    };
    assert_eq!(links, MAX_CHAIN);
    let line = cellblock::remedy::one_line(&error);
    assert!(line.contains("a chain of 64") && line.ends_with("can be diffs"), "{line}");
    merge(&Chain::open(&last).unwrap(), &link(links), Arc::default(), |_, _| {}).unwrap();
}

#[test]
fn chunks_can_come_from_another_snapshot() {
    let (dir, one) = place();
    let (target, ram) = (dir.path().join("two"), ram());
    // Chunk 3 changed; the others are as in `one`, and not looked at in RAM.
    ram.write_all_at(&pattern(200, 9), (200 * PAGE) as u64).unwrap();
    let expected = bytes_of(&ram);
    ram.write_all_at(&[1; PAGE], 0).unwrap();
    let mut writer = Writer::create(&target, CONTENTS, None).unwrap();
    writer.copy_chunks(ram.as_fd(), |index| index == 3).unwrap();
    let others = (0..CHUNKS).filter(|index| *index != 3);
    writer.copy_from(&Chain::open(&one).unwrap(), others).unwrap();
    writer.state(STATE).unwrap();
    writer.commit().unwrap();
    fs::remove_dir_all(&one).unwrap();
    verify(&target).unwrap();
    assert_eq!(contents(&Chain::open(&target).unwrap()), expected);
}

#[test]
fn copied_disks_are_kept_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let image = tempfile::tempfile().unwrap();
    image.set_len(3 << 20).unwrap();
    image.write_all_at(b"block", 1 << 20).unwrap();
    let target = dir.path().join("with-disk");
    let mut writer = Writer::create(&target, CONTENTS, None).unwrap();
    writer.disk("disk0", &image).unwrap();
    writer.state(STATE).unwrap();
    writer.commit().unwrap();
    verify(&target).unwrap();
    let copy = Snapshot::open(&target).unwrap().disk("disk0").unwrap().unwrap();
    let mut seen = [0; 5];
    copy.read_exact_at(&mut seen, 1 << 20).unwrap();
    assert_eq!((&seen, copy.metadata().unwrap().len()), (b"block", 3 << 20));
    flip(&target.join("disk-disk0"), 2 << 20);
    assert!(refused(&target).contains("the image 'disk-disk0' is damaged"));
    // Nor does a merge make a whole snapshot of it.
    let flat = dir.path().join("flat");
    let mut merge = Command::new(env!("CARGO_BIN_EXE_cellblock"));
    let merged = merge.args(["snapshot", "merge"]).args([&target, &flat]).output().unwrap();
    let line = String::from_utf8(merged.stderr).unwrap();
    assert_eq!((merged.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    assert!(line.contains("the image 'disk-disk0' is damaged"), "{line}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something is left");
}

/// A merge that is interrupted leaves nothing.
#[test]
fn a_merge_that_is_called_off_leaves_nothing() {
    let (dir, target) = place();
    let merged = merge(
        &Chain::open(&target).unwrap(),
        &dir.path().join("flat"),
        Arc::new(AtomicBool::new(true)),
        |_, _| {},
    );
    assert!(merged.unwrap_err().to_string().contains("called off"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something is left");
}

#[test]
fn nothing_is_left_of_a_failed_write() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("one");
    let count = || fs::read_dir(dir.path()).unwrap().count();

    let writer = Writer::create(&target, CONTENTS, None).unwrap();
    assert!(matches!(writer.commit(), Err(WriteError::NoState(_))));
    assert_eq!(count(), 0);

    let mut writer = Writer::create(&target, CONTENTS, None).unwrap();
    writer.state(STATE).unwrap();
    writer.cancel().store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(writer.copy_all(ram().as_fd()), Err(WriteError::Cancelled(_))));
    drop(writer);
    assert_eq!(count(), 0);

    // Two at once: the second to arrive is refused, the first stays.
    let ready = || {
        let mut writer = Writer::create(&target, CONTENTS, None).unwrap();
        writer.state(STATE).unwrap();
        writer
    };
    let (first, second) = (ready(), ready());
    let id = first.commit().unwrap().id;
    assert!(matches!(second.commit(), Err(WriteError::Exists(_))));
    assert_eq!(Snapshot::open(&target).unwrap().manifest().id, id);
    assert!(matches!(Writer::create(&target, CONTENTS, None), Err(WriteError::Exists(_))));
    assert_eq!(count(), 1);

    let large = vec![0; (64 << 20) + 1];
    let mut writer = Writer::create(&dir.path().join("two"), CONTENTS, None).unwrap();
    assert!(matches!(writer.state(&large), Err(WriteError::TooLarge { .. })));
    drop(writer);
    assert_eq!(count(), 1);
    for memory in [0, 4096, u64::MAX, (1 << 42) + CHUNK as u64] {
        let contents = Contents { memory, ..CONTENTS };
        assert!(Writer::create(&dir.path().join("two"), contents, None).is_err());
    }
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn every_flipped_byte_of_the_manifest_is_refused_and_described() {
    let (_dir, one) = place();
    let manifest = one.join("manifest");
    let whole = fs::read(&manifest).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        fs::write(&manifest, &damaged).unwrap();
        verify(&one).unwrap_err();
        let described = describe(&one).unwrap();
        assert!(described.fault.is_some(), "byte {at}");
        assert_eq!(described.manifest.is_some(), at >= 8, "byte {at}");
    }
    // By the program: what can be read is said, the status is 2.
    let mut damaged = whole.clone();
    damaged[50] ^= 1;
    fs::write(&manifest, &damaged).unwrap();
    assert!(refused(&one).contains("the manifest is damaged"));
    let output = cellblock("describe", &one);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stdout).unwrap().contains("memory    2.0 MiB"));
    assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);

    fs::write(&manifest, &whole).unwrap();
    assert_eq!(cellblock("describe", &one).status.code(), Some(0));
    assert_eq!(cellblock("verify", &one).status.code(), Some(0));
}

#[test]
fn described_as_json() {
    let (_dir, one) = place();
    let output = Command::new(env!("CARGO_BIN_EXE_cellblock"))
        .args(["describe", "--json"])
        .arg(&one)
        .output()
        .unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["format"], "1.0");
    assert_eq!(value["memory"], MEMORY);
    assert_eq!(value["vcpus"], 2);
    assert_eq!(value["whole"], true);
    assert_eq!(value["parent"], serde_json::Value::Null);
}

/// A fixed sequence that looks random.
fn places(len: u64) -> impl Iterator<Item = u64> {
    let mut x = 0x1234_5678_9abc_def1_u64;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % len
    })
}

#[test]
fn state_and_memory_damaged_anywhere_are_refused() {
    let (_dir, one) = place();
    for name in ["state", "memory"] {
        let path = one.join(name);
        let len = fs::metadata(&path).unwrap().len();
        for at in places(len).take(1000) {
            flip(&path, at);
            assert!(verify(&one).is_err(), "{name}: byte {at} flipped");
            flip(&path, at);
        }
        verify(&one).unwrap();
        let whole = fs::read(&path).unwrap();
        for at in places(len).take(1000) {
            File::options().write(true).open(&path).unwrap().set_len(at).unwrap();
            let refused = verify(&one).unwrap_err();
            assert!(matches!(refused.fault, Fault::Length { .. }), "{refused:?}");
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&whole[at as usize..], at).unwrap();
        }
        verify(&one).unwrap();
        // Longer is as wrong as shorter.
        File::options().write(true).open(&path).unwrap().set_len(len + 1).unwrap();
        assert!(refused(&one).contains("bytes where"));
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn files_of_two_snapshots_are_not_one() {
    let (dir, one) = place();
    let two = dir.path().join("two");
    write(&two, &ram());
    for name in ["state", "memory"] {
        let mixed = dir.path().join(format!("mixed-{name}"));
        copy_dir(&one, &mixed);
        fs::copy(two.join(name), mixed.join(name)).unwrap();
        let line = refused(&mixed);
        assert!(line.contains(&format!("'{name}' belongs to snapshot")), "{line}");
    }
}

#[test]
fn what_is_no_file_of_ours_is_refused_at_once() {
    let (dir, one) = place();
    let with = |name: &str, change: &dyn Fn(&Path)| {
        let bad = dir.path().join("bad");
        copy_dir(&one, &bad);
        fs::remove_file(bad.join(name)).unwrap();
        change(&bad.join(name));
        let line = refused(&bad);
        fs::remove_dir_all(&bad).unwrap();
        line
    };
    for name in ["manifest", "state", "memory"] {
        let len = fs::metadata(one.join(name)).unwrap().len();
        let is = |line: String, text: &str| assert!(line.contains(text), "{name}: {line}");
        is(with(name, &|_| {}), "opening");
        is(with(name, &|path| symlink(one.join(name), path).unwrap()), "is not a regular file");
        is(with(name, &|path| fs::create_dir(path).unwrap()), "is not a regular file");
        let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        is(with(name, &fifo), "is not a regular file");
        let zeros = |path: &Path| File::create(path).unwrap().set_len(len).unwrap();
        is(with(name, &zeros), "is not of a Cellblock snapshot");
        let text = |path: &Path| fs::write(path, "once upon a time ").unwrap();
        with(name, &text);
        with(name, &|path| drop(File::create(path).unwrap()));
        // As much as a file may claim to have.
        let huge = |path: &Path| {
            let file = File::create(path).unwrap();
            let most = (40..63).rev().find(|bits| file.set_len((1 << bits) - 4096).is_ok());
            most.unwrap();
        };
        with(name, &huge);
    }
    assert!(refused(&dir.path().join("none")).contains("opening the directory"));
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(refused(&file).contains("opening the directory"));
}

#[test]
fn absurd_numbers_are_refused_before_anything_is_allocated() {
    use cellblock::snapshot::format::checksum::crc64;
    let (_dir, one) = place();
    let manifest = one.join("manifest");
    let whole = fs::read(&manifest).unwrap();
    let places: &[(usize, usize)] =
        &[(12, 4), (64, 8), (72, 4), (76, 4), (88, 8), (112, 4), (116, 4), (120, 4)];
    for (at, len) in places.iter().copied() {
        for value in [0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 41, u64::MAX] {
            let mut bytes = whole.clone();
            bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            let end = bytes.len() - 8;
            let crc = crc64(&bytes[..end]);
            bytes[end..].copy_from_slice(&crc.to_le_bytes());
            let same = bytes == whole || (at == 112);
            fs::write(&manifest, &bytes).unwrap();
            assert!(same || verify(&one).is_err(), "{value:#x} at {at}");
        }
    }
    for (at, version) in [(8, 2u16), (10, 1), (8, 0), (10, 0xffff)] {
        let mut bytes = whole.clone();
        bytes[at..at + 2].copy_from_slice(&version.to_le_bytes());
        let end = bytes.len() - 8;
        let crc = crc64(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        fs::write(&manifest, &bytes).unwrap();
        let line = refused(&one);
        assert!(line.contains("this program reads up to 1.0; use the version"), "{line}");
    }
}

/// Snapshots of format 1.0 as the first version wrote them: readable for ever.
#[test]
fn golden_snapshots_stay_readable() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1.0");
    let page = |n: u8| [n; PAGE];
    let check = |name: &str, pages: [(usize, u8); 5]| {
        let chain = Chain::open(&golden.join(name)).unwrap();
        chain.verify_all(|_, _| {}).unwrap();
        let mut chunk = vec![0xee; CHUNK];
        for index in 0..2 {
            chain.read_chunk(index, &mut chunk).unwrap();
            for (at, byte) in pages.iter().filter(|(at, _)| at / 64 == index) {
                let at = at % 64 * PAGE;
                assert_eq!(chunk[at..at + PAGE], page(*byte), "{name}: page {at}");
            }
        }
        chain
    };
    let full = check("full", [(0, 1), (1, 0), (3, 2), (74, 3), (75, 0)]);
    let manifest = full.manifest();
    assert_eq!((manifest.version, manifest.memory, manifest.vcpus), ((1, 0), 512 << 10, 2));
    assert_eq!((manifest.live, &manifest.parent), (false, &None));
    assert_eq!(full.snapshot().state().unwrap(), b"state of a golden snapshot");
    let mut image = Vec::new();
    let mut copy = full.snapshot().disk("data").unwrap().unwrap();
    std::io::Read::read_to_end(&mut copy, &mut image).unwrap();
    assert_eq!(image, [7; 1024]);

    let diff = check("diff", [(0, 1), (1, 4), (3, 5), (74, 0), (75, 0)]);
    assert_eq!(diff.links().len(), 2);
    assert!(diff.manifest().live);
    assert_eq!(diff.snapshot().state().unwrap(), b"state of a golden diff");
}
