//! Talks to a program's console by a script, the way a patient person would: it waits for what it
//! expects to read, up to a deadline, and fails saying what was missing.
//!
//! usage: talk SCRIPT [--socket PATH] [--set NAME=VALUE]... -- PROGRAM ARGUMENTS...
//!
//! The program is started; its console is its standard input and output, or the Unix socket PATH
//! that it listens on. Everything read is shown. Lines of the script (`$NAME` is replaced):
//!
//! | line | meaning |
//! |---|---|
//! | `limit SECONDS` | deadline of each of the following steps (60 before) |
//! | `expect TEXT` | wait for TEXT |
//! | `wake TEXT` | wait for TEXT, pressing enter every two seconds: what was printed before the console was connected may be gone |
//! | `send TEXT` | type TEXT and a newline |
//! | `run COMMAND` | at a shell's prompt: type COMMAND, wait for its end; its status must be 0 |
//! | `answer TEXT` | the last `run` printed TEXT, blanks around it aside |
//! | `keep NAME` | what the last `run` printed is called NAME from now on |
//! | `until PATH` | wait for the file PATH to be there, on this side |
//! | `end STATUS` | wait for the program to end with STATUS |
//!
//! Exit status: 0 when the whole script was followed, else 1, after one line that says why.

use std::collections::HashMap;
use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

type Fallible<T> = Result<T, Box<dyn Error>>;

struct Arguments {
    script: String,
    socket: Option<String>,
    names: HashMap<String, String>,
    program: Vec<String>,
}

/// The other side of the console.
struct Peer {
    child: Child,
    input: Box<dyn Write>,
    chunks: Receiver<Vec<u8>>,
    /// Read, and not yet matched by a step.
    unread: String,
    limit: Duration,
    last_output: String,
    runs: u32,
}

fn main() {
    let result = arguments().and_then(|arguments| talk(&arguments));
    if let Err(error) = result {
        eprintln!("\ntalk: {error}");
        std::process::exit(1);
    }
}

fn arguments() -> Fallible<Arguments> {
    let mut words = std::env::args().skip(1);
    let script = words.next().ok_or("no script given")?;
    let mut parsed = Arguments { script, socket: None, names: HashMap::new(), program: Vec::new() };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--socket" => parsed.socket = Some(value()?),
            "--set" => {
                let pair = value()?;
                let (name, value) = pair.split_once('=').ok_or("--set needs NAME=VALUE")?;
                parsed.names.insert(name.into(), value.into());
            }
            "--" => {
                parsed.program = words.collect();
                break;
            }
            _ => return Err(format!("{word} is not an option").into()),
        }
    }
    if parsed.program.is_empty() {
        return Err("no program given".into());
    }
    Ok(parsed)
}

fn talk(arguments: &Arguments) -> Fallible<()> {
    let script = std::fs::read_to_string(&arguments.script)
        .map_err(|error| format!("reading the script {}: {error}", arguments.script))?;
    let mut names = arguments.names.clone();
    let mut peer = Peer::start(arguments)?;
    for (number, line) in (1..).zip(script.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = substitute(line, &names);
        let (verb, rest) = line.split_once(' ').unwrap_or((line.as_str(), ""));
        let step = match verb {
            "limit" => rest.parse().map_err(Into::into).map(|seconds| {
                peer.limit = Duration::from_secs(seconds);
            }),
            "wake" => peer.wake(rest),
            "expect" => peer.expect(rest).map(drop),
            "send" => peer.send(rest),
            "run" => peer.run(rest),
            "answer" if peer.last_output.trim() == rest => Ok(()),
            "answer" => Err(format!("the answer was {:?}", peer.last_output.trim()).into()),
            "keep" => {
                names.insert(rest.into(), peer.last_output.trim().into());
                Ok(())
            }
            "until" => peer.until(Path::new(rest)),
            "end" => rest.parse().map_err(Into::into).and_then(|status| peer.end(status)),
            _ => Err("not a step that is known".into()),
        };
        if let Err(error) = step {
            // Leave nothing behind that nobody waits for.
            let _ = peer.child.kill();
            let _ = peer.child.wait();
            return Err(format!("{}:{number}: {line}: {error}", arguments.script).into());
        }
    }
    Ok(())
}

/// Replaces `$NAME`, longest names first.
fn substitute(line: &str, names: &HashMap<String, String>) -> String {
    let mut sorted: Vec<_> = names.iter().collect();
    sorted.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    sorted
        .iter()
        .fold(line.to_string(), |line, (name, value)| line.replace(&format!("${name}"), value))
}

impl Peer {
    fn start(arguments: &Arguments) -> Fallible<Self> {
        let (program, rest) = arguments.program.split_first().ok_or("no program given")?;
        let mut command = Command::new(program);
        command.args(rest);
        if arguments.socket.is_none() {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|error| format!("starting {program}: {error}"))?;
        let (input, output): (Box<dyn Write>, Box<dyn Read + Send>) = match &arguments.socket {
            Some(path) => {
                let stream = connect(path, &mut child)?;
                (Box::new(stream.try_clone()?), Box::new(stream))
            }
            None => {
                let input = child.stdin.take().ok_or("no standard input")?;
                let output = child.stdout.take().ok_or("no standard output")?;
                (Box::new(input), Box::new(output))
            }
        };
        let chunks = read_in_background(output);
        let limit = Duration::from_secs(60);
        let (unread, last_output) = (String::new(), String::new());
        Ok(Self { child, input, chunks, unread, limit, last_output, runs: 0 })
    }

    fn wake(&mut self, text: &str) -> Fallible<()> {
        let deadline = Instant::now() + self.limit;
        loop {
            match self.expect_by(text, deadline.min(Instant::now() + Duration::from_secs(2))) {
                Err(_) if Instant::now() < deadline && self.child.try_wait()?.is_none() => {
                    self.input.write_all(b"\n")?;
                }
                result => return result.map(drop),
            }
        }
    }

    /// Reads until `text` has come; what came before it.
    fn expect(&mut self, text: &str) -> Fallible<String> {
        self.expect_by(text, Instant::now() + self.limit)
    }

    fn expect_by(&mut self, text: &str, deadline: Instant) -> Fallible<String> {
        loop {
            if let Some(at) = self.unread.find(text) {
                let before = self.unread[..at].to_string();
                self.unread.drain(..at + text.len());
                return Ok(before);
            }
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => {
                    let mut screen = std::io::stdout();
                    screen.write_all(&chunk)?;
                    screen.flush()?;
                    self.unread.push_str(&String::from_utf8_lossy(&chunk));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("{text:?} has not come in {:?}", self.limit).into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("the console closed before {text:?} came").into());
                }
            }
        }
    }

    fn send(&mut self, text: &str) -> Fallible<()> {
        println!("{text}");
        self.input.write_all(format!("{text}\n").as_bytes())?;
        self.input.flush()?;
        Ok(())
    }

    fn run(&mut self, command: &str) -> Fallible<()> {
        self.runs += 1;
        let n = self.runs;
        // Quoted in the middle, so that an echo of the typed line holds no marker.
        self.send(&format!("echo \"begin\"\"-{n}:\"; {command}; echo \"end\"\"-{n}:$?:\""))?;
        self.expect(&format!("begin-{n}:"))?;
        self.last_output = self.expect(&format!("end-{n}:"))?.replace('\r', "");
        let status = self.expect(":")?;
        if status != "0" {
            return Err(format!("the command's status is {status}").into());
        }
        self.expect("# ")?;
        Ok(())
    }

    fn until(&mut self, path: &Path) -> Fallible<()> {
        let deadline = Instant::now() + self.limit;
        while !path.exists() {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the program ended with {status} meanwhile").into());
            }
            if Instant::now() > deadline {
                return Err(format!("it is not there after {:?}", self.limit).into());
            }
            for chunk in self.chunks.try_iter() {
                std::io::stdout().write_all(&chunk)?;
                self.unread.push_str(&String::from_utf8_lossy(&chunk));
            }
            std::io::stdout().flush()?;
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn end(&mut self, wanted: i32) -> Fallible<()> {
        let deadline = Instant::now() + self.limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                for chunk in self.chunks.try_iter() {
                    std::io::stdout().write_all(&chunk)?;
                }
                if status.code() != Some(wanted) {
                    return Err(format!("the program ended with {status}").into());
                }
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the program runs on after {:?}", self.limit).into());
            }
            // Its end of file is the event to wait for; a program may close its console earlier.
            match self.chunks.recv_timeout(Duration::from_millis(20)) {
                Ok(chunk) => std::io::stdout().write_all(&chunk)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Connects to the program's console socket as soon as it is there.
fn connect(path: &str, child: &mut Child) -> Fallible<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(format!("connecting to {path}: {error}").into());
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("the program ended with {status} before {path} was there").into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn read_in_background(mut output: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}
