//! Fuzzes a running guest from outside: stops it where it says that it is ready, changes its input,
//! lets it run, and sees whether it comes through, crashes or hangs.
//!
//! ```text
//! snapfuzz SOCKET --buffer ADDR+LENGTH [--port N] [--runs N] [--timeout-ms N] [--seed N]
//!          [--reset 'cellblock reset /tmp/vm']
//! ```
//! The guest tells how far it is by bytes to a port (0x510 unless said otherwise) that belongs to
//! nobody else: 1 it is ready and waits for its input, 2 it has come through, 3 it has crashed. The
//! input is `LENGTH` bytes at guest-physical `ADDR`. A guest that says nothing within the timeout
//! hangs; a triple fault that ends the VM is a crash.
//!
//! A guest that goes back to 1 by itself after 2 needs no reset. `--reset` names the command that
//! puts it back after a crash or a hang, such as `cellblock reset CONTROL` for a VM that was restored
//! from a snapshot of the time before it said 1; without one, the first of either ends the run. Every
//! input that crashes or hangs is printed. The VM has to hand its memory out: `--plugin-socket
//! PATH,memory=rw`. A triple fault that ends the VM cannot be reset.

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_plugin_api::{Error, Event, GuestMemory, Space, Vcpu, Vm};

struct Options {
    socket: String,
    buffer: (u64, usize),
    port: u64,
    runs: u64,
    timeout: Duration,
    seed: u64,
    reset: Option<String>,
}

/// How one run of the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Through,
    Crashed,
    Hung,
}

/// The number of our stops.
const RESET: u64 = 0x7265_7365;
const READY: u8 = 1;
const THROUGH: u8 = 2;
const CRASHED: u8 = 3;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(options) = options(&words) else {
        eprintln!(
            "usage: snapfuzz SOCKET --buffer ADDR+LENGTH [--port N] [--runs N] [--timeout-ms N] \
             [--seed N] [--reset COMMAND]"
        );
        return ExitCode::from(2);
    };
    match fuzz(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(3),
        Err(error) => {
            eprintln!("snapfuzz: {error}: {}", io::Error::from_raw_os_error(error.errno()));
            ExitCode::FAILURE
        }
    }
}

/// Runs the guest with one input after the other; how many it did not come through.
fn fuzz(options: &Options) -> Result<u64, Error> {
    let mut guest = Guest::attach(options)?;
    let mut random = Random(options.seed | 1);
    let (mut runs, mut found) = (0, 0);
    let begin = Instant::now();
    let mut input = vec![0; options.buffer.1];
    while runs < options.runs {
        if guest.wait_for(&[READY])? != Some(READY) {
            eprintln!("snapfuzz: the guest is not ready");
            break;
        }
        guest.read(&mut input)?;
        random.mutate(&mut input);
        guest.write(&input)?;
        let verdict = guest.run()?;
        runs += 1;
        if verdict == Verdict::Through {
            continue;
        }
        found += 1;
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        println!("{verdict:?} in run {runs} with {hex}");
        if !guest.reset()? {
            break;
        }
    }
    let rate = runs as f64 / begin.elapsed().as_secs_f64();
    println!("{runs} runs, {found} crashed or hung, {rate:.0} a second");
    Ok(found)
}

struct Guest<'a> {
    options: &'a Options,
    vm: Vm,
    /// The one that talks: the fuzzed program runs on one vCPU.
    vcpu: Arc<Vcpu>,
    memory: GuestMemory,
    held: bool,
}

impl Guest<'_> {
    fn attach(options: &Options) -> Result<Guest<'_>, Error> {
        let vm = Vm::attach(Path::new(&options.socket))?;
        vm.reserve_range(Space::Port, options.port, 1)?;
        let memory = vm.guest_memory()?;
        let (address, length) = options.buffer;
        memory
            .place(address, length)
            .ok_or(Error::Protocol("the buffer is not in the guest's memory"))?;
        let vcpu = vm.vcpu(0)?;
        Ok(Guest { options, vcpu, vm, memory, held: false })
    }

    /// Waits until the guest says one of `bytes`: it is stopped then. `None` when it does not.
    fn wait_for(&mut self, bytes: &[u8]) -> Result<Option<u8>, Error> {
        let until = Instant::now() + self.options.timeout;
        loop {
            if self.held {
                self.vcpu.resume()?;
                self.held = false;
            }
            let left = until.saturating_duration_since(Instant::now());
            let Some(event) = self.vcpu.wait_timeout(left)? else { return Ok(None) };
            self.held = true;
            if let Event::Access(access) = event
                && access.is_write
                && let Some(byte) = access.data.first().filter(|byte| bytes.contains(byte))
            {
                return Ok(Some(*byte));
            }
        }
    }

    /// Lets the guest work on its input.
    fn run(&mut self) -> Result<Verdict, Error> {
        match self.wait_for(&[THROUGH, CRASHED]) {
            Ok(Some(THROUGH)) => Ok(Verdict::Through),
            Ok(Some(_)) | Err(Error::Closed) => Ok(Verdict::Crashed),
            Ok(None) => Ok(Verdict::Hung),
            Err(error) => Err(error),
        }
    }

    /// Puts the guest back to where it was; `false` where that is not possible. It is stopped between
    /// two instructions before, whatever it was doing, so that it says nothing meanwhile, and after.
    fn reset(&mut self) -> Result<bool, Error> {
        let Some(command) = &self.options.reset else { return Ok(false) };
        self.vm.pause_vcpus(1, RESET)?;
        loop {
            if self.held {
                self.vcpu.resume()?;
            }
            let event = self.vcpu.wait()?;
            self.held = true;
            if event == (Event::Paused { user: RESET }) {
                break;
            }
        }
        let reset = Command::new("sh").args(["-c", command]).status();
        Ok(reset.is_ok_and(|status| status.success()))
    }

    fn read(&self, input: &mut [u8]) -> Result<(), Error> {
        self.memory.read(self.options.buffer.0, input)
    }

    /// Changes the input. The VMM is told, so that a reset puts back what was there.
    fn write(&self, input: &[u8]) -> Result<(), Error> {
        self.memory.write(self.options.buffer.0, input)
    }
}

/// xorshift: the same seed, the same inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Changes one to four bytes.
    fn mutate(&mut self, input: &mut [u8]) {
        let len = input.len() as u64;
        for _ in 0..=self.next() % 4 {
            let at = (self.next() % len) as usize;
            input[at] = match self.next() % 3 {
                0 => input[at] ^ 1 << (self.next() % 8),
                1 => self.next() as u8,
                _ => input[at].wrapping_add(1),
            };
        }
    }
}

fn options(words: &[String]) -> Option<Options> {
    let (socket, mut rest) = words.split_first()?;
    let mut made = Options {
        socket: socket.clone(),
        buffer: (0, 0),
        port: 0x510,
        runs: 1000,
        timeout: Duration::from_secs(1),
        seed: 1,
        reset: None,
    };
    while let Some((key, values)) = rest.split_first() {
        let (value, after) = values.split_first()?;
        rest = after;
        match key.as_str() {
            "--buffer" => {
                let (address, length) = value.split_once('+')?;
                made.buffer = (number(address)?, usize::try_from(number(length)?).ok()?);
            }
            "--port" => made.port = number(value)?,
            "--runs" => made.runs = number(value)?,
            "--timeout-ms" => made.timeout = Duration::from_millis(number(value)?),
            "--seed" => made.seed = number(value)?,
            "--reset" => made.reset = Some(value.clone()),
            _ => return None,
        }
    }
    (made.buffer.1 > 0).then_some(made)
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
