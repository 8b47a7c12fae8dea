//! temp
use cellblock_devices::protocol::{LogLevel, SeccompMode};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("@cell") { cellblock_devices::cell::main(&args); }
    let mut c = cellblock::config::VmConfig { kernel: "".into(), initrd: None, cmdline: String::new(), cpus: 1, memory: 128<<20, disks: vec![], serial: "stdout".parse().unwrap(), control: None, sandbox: true, seccomp: SeccompMode::Kill, log: LogLevel::Debug };
    let mut it = args.into_iter().skip(1);
    while let Some(a) = it.next() {
        match a.as_str() {
            "run" | "--die-with-parent" => {}
            "--kernel" => c.kernel = it.next().unwrap().into(),
            "--cmdline" => c.cmdline = it.next().unwrap(),
            "-c" => c.cpus = it.next().unwrap().parse().unwrap(),
            "-m" => c.memory = it.next().unwrap().trim_end_matches('M').parse::<u64>().unwrap() << 20,
            "--disk" => c.disks.push(it.next().unwrap().parse().unwrap()),
            "--serial" => c.serial = it.next().unwrap().parse().unwrap(),
            "--control" => c.control = Some(it.next().unwrap().into()),
            "--disable-sandbox" => c.sandbox = false,
            "--seccomp" => { it.next(); c.seccomp = SeccompMode::Log }
            "demo" => { cellblock::demo::run().unwrap(); return; }
            _ => panic!("{a}"),
        }
    }
    tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_writer(std::io::stderr).init();
    match cellblock::vmm::run(c) { Ok(e) => eprintln!("end {e:?}"), Err(e) => { eprintln!("error: {}", cellblock::remedy::chain(&e)); std::process::exit(1) } }
}
