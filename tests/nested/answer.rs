//! Waits for what a claimed VM says: `answer FILE TEXT` reads a pool's answer to a claim from FILE,
//! connects to the console that it names, and prints the first line with TEXT in it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(240);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, file, text] = &args[..] else { panic!("usage: answer FILE TEXT") };
    let end = Instant::now() + LIMIT;
    let claim = loop {
        let claim = std::fs::read_to_string(file).unwrap_or_default();
        if claim.ends_with('\n') {
            break claim;
        }
        assert!(Instant::now() < end, "{file} has no answer");
        std::thread::sleep(Duration::from_millis(20));
    };
    let (_, path) = claim.split_once("\"console\":\"").expect("a console");
    let (path, _) = path.split_once('"').expect("the end of its path");
    let console = UnixStream::connect(path).expect("the console");
    console.set_read_timeout(Some(LIMIT)).expect("a limit");
    let mut lines = BufReader::new(console);
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        match lines.read_line(&mut line) {
            Ok(1..) if line.contains(text.as_str()) => return print!("{line}"),
            Ok(1..) => seen.push_str(&line),
            other => panic!("no {text:?} but {seen:?}: {other:?}"),
        }
    }
}
