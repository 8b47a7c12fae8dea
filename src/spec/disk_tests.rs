//! What a disk SPEC says, and what of it can be opened.

use super::*;
use crate::remedy::one_line;
use cellblock_devices::protocol::Rate;

fn parse(spec: &str) -> Result<DiskSpec, SpecError> {
    spec.parse()
}

#[test]
fn every_key_of_this_version() {
    let disk =
        parse("a/b.img,ro,direct,id=root-1,serial=S/N=7,poll-us=50,queues=32,engine=io_uring")
            .unwrap();
    assert_eq!(
        disk,
        DiskSpec {
            path: "a/b.img".into(),
            id: Some("root-1".into()),
            read_only: true,
            cow: None,
            serial: Some("S/N=7".into()),
            poll_us: 50,
            queues: Some(32),
            throttle: ThrottleLimits::default(),
            direct: true,
            engine: Some(EngineKind::IoUring),
            vhost_user: None,
        }
    );
    assert_eq!(disk.queues(4), 32);
    for (spec, cow) in [
        ("d,cow", Some(Place::Memory)),
        ("d,cow=true", Some(Place::Memory)),
        ("d,cow=false,ro", None),
        ("d,cow=/var/a,,b", Some(Place::Directory("/var/a,b".into()))),
    ] {
        assert_eq!(parse(spec).unwrap().cow, cow, "{spec}");
    }
    let other = parse("vhost-user=a,,b/s,id=far").unwrap();
    assert_eq!((other.vhost_user, other.id), (Some("a,b/s".into()), Some("far".into())));
    assert_eq!(parse("./vhost-user=x").unwrap().path, Path::new("./vhost-user=x"));
    let plain = parse("x,,y").unwrap();
    assert_eq!(plain.path, Path::new("x,y"));
    assert!(!plain.read_only && plain.id.is_none() && plain.poll_us == POLL_US);
    // A queue for each vCPU, as far as queues go.
    assert_eq!([1, 4, 255].map(|cpus| plain.queues(cpus)), [1, 4, MAX_QUEUES]);
}

#[test]
fn a_disk_that_becomes_cow_goes_through_the_page_cache() {
    for (spec, engine) in [
        ("d,direct", None),
        ("d,direct,engine=io_uring", None),
        ("d,direct,engine=sync", Some(EngineKind::Sync)),
    ] {
        let mut disk = parse(spec).unwrap();
        disk.keep_writes(Place::Memory);
        assert_eq!((disk.cow, disk.direct, disk.engine), (Some(Place::Memory), false, engine));
    }
}

#[test]
fn limits_have_bursts() {
    let limits = |spec| parse(spec).unwrap().throttle;
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    assert_eq!(
        limits("d,bw=100M,bw-burst=1G,iops=5000,iops-burst=6000"),
        ThrottleLimits { bytes: rate(100 << 20, 1 << 30), requests: rate(5000, 6000) }
    );
    assert_eq!(limits("d,iops=7"), ThrottleLimits { bytes: None, requests: rate(7, 7) });
}

#[test]
fn what_is_wrong_is_named() {
    let long_id = format!("d,id={}", "a".repeat(33));
    for (spec, part) in [
        ("", "no path"),
        (",ro", "no path"),
        ("d,rw", "unknown key 'rw': known keys are ro, direct,"),
        ("d,", "unknown key ''"),
        ("d,ro,ro", "'ro' is given twice"),
        ("d,ro=yes", "'ro' cannot be 'yes'"),
        ("d,id", "'id' needs a value: id=NAME"),
        ("d,id=", "'id' needs a value"),
        ("d,id=A", "'id' cannot be 'A': an id is 1 to 32"),
        ("d,id=a/b", "an id is 1 to 32"),
        (long_id.as_str(), "an id is 1 to 32"),
        ("d,id=com1", "another device"),
        ("d,serial=123456789012345678901", "1 to 20"),
        ("d,serial=a b", "1 to 20"),
        ("d,poll-us=-1", "microseconds"),
        ("d,poll-us=100001", "up to 100000"),
        ("d,engine=aio", "'engine' cannot be 'aio': it is sync or io_uring"),
        ("d,queues=0", "'queues' cannot be '0': it is 1 to 32"),
        ("d,queues=33", "it is 1 to 32"),
        ("d,bw=fast", "'bw' cannot be 'fast': 'fast' is not a size"),
        ("d,iops=5K", "it is a number of requests"),
        ("d,bw-burst=5", "bw-burst needs a rate"),
        ("d,iops=5,iops-burst=4", "has to be at least iops"),
        ("d,ro,cow", "give one of 'ro' and 'cow'"),
        ("d,cow,direct", "a disk with 'cow' has neither 'direct' nor 'engine=io_uring'"),
        ("d,cow,engine=io_uring", "has neither 'direct' nor"),
        ("d,cow=", "'cow' needs a value: cow=DIR"),
        ("vhost-user=/s,cow", "key 'cow' is the back end's affair"),
        ("d,vhost-user=/s", "the back end has the image: write vhost-user=SOCKET[,id=NAME]"),
        ("vhost-user=", "'vhost-user' needs a value: vhost-user=SOCKET"),
        ("vhost-user=/s,queues=33", "it is 1 to 32"),
        ("vhost-user=/s,ro", "key 'ro' is the back end's affair"),
        ("vhost-user=/s,rw", "unknown key 'rw'"),
    ] {
        let line = parse(spec).unwrap_err().to_string();
        assert!(line.contains(part), "{spec}: {line}");
    }
}

#[test]
fn every_known_key_is_read() {
    for key in KEYS {
        match parse(&format!("d,{key}=7")) {
            Ok(_)
            | Err(
                SpecError::BadValue { .. } | SpecError::Throttle(_) | SpecError::BackEndHasImage,
            ) => {}
            Err(other) => panic!("{key}: {other}"),
        }
    }
}

#[test]
fn disks_get_names_of_their_own() {
    let mut disks = [parse("a").unwrap(), parse("b,id=b").unwrap(), parse("c").unwrap()];
    name_disks(&mut disks).unwrap();
    assert_eq!(disks.each_ref().map(DiskSpec::id), ["disk0", "b", "disk2"]);

    let mut shared = [parse("a,id=disk1").unwrap(), parse("b").unwrap()];
    assert_eq!(name_disks(&mut shared), Err(SpecError::SharedId("disk1".into())));
}

fn image(dir: &Path, name: &str, size: u64) -> DiskSpec {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    let mut disk = [parse(path.to_str().unwrap()).unwrap()];
    name_disks(&mut disk).unwrap();
    let [disk] = disk;
    disk
}

#[test]
fn an_image_opens_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "a", 1024);
    let opened = disk.open().unwrap();
    assert_eq!((opened.size, opened.read_only, opened.serial.as_str()), (1024, false, "disk0"));
    let flags = fcntl(&opened.fd, FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    assert_eq!(flags & libc::O_ACCMODE, libc::O_RDWR);
}

#[test]
fn what_is_no_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| DiskSpec { path: dir.path().join(name), ..parse("x").unwrap() };
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::net::UnixListener::bind(dir.path().join("sock")).unwrap();
    for (disk, part) in [
        (at("none"), "(os error 2); check the path"),
        (at("."), "is a directory, not a disk image; give a raw"),
        (DiskSpec { read_only: true, ..at(".") }, "is a directory"),
        (at("fifo"), "is a pipe"),
        (at("sock"), "is a socket"),
        (DiskSpec { path: "/dev/null".into(), ..at("x") }, "is a character device"),
        (image(dir.path(), "empty", 0), "is empty; give it a size"),
        (image(dir.path(), "ragged", 513), "513 bytes, which is not a multiple of 512; if it"),
    ] {
        let line = one_line(&disk.open().unwrap_err());
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let writer = image(dir.path(), "a", 512);
    let reader = DiskSpec { read_only: true, ..writer.clone() };

    let held = writer.open().unwrap();
    assert!(matches!(writer.open(), Err(DiskError::InUse { .. })));
    assert!(matches!(reader.open(), Err(DiskError::InUse { .. })));
    // A duplicate, as a device process gets one, keeps the lock.
    let duplicate = held.fd.try_clone().unwrap();
    drop(held);
    assert!(matches!(writer.open(), Err(DiskError::InUse { .. })));
    drop(duplicate);

    let (_one, _two) = (reader.open().unwrap(), reader.open().unwrap());
    let cow = DiskSpec { cow: Some(Place::Memory), ..writer.clone() };
    let opened = cow.open().unwrap();
    assert!(!opened.read_only && opened.overlay.is_some());
    let flags = fcntl(&opened.fd, FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY, "the image can be written");
    let line = one_line(&writer.open().unwrap_err());
    assert!(line.contains("in use") && line.contains(",ro"), "{line}");
}
