//! Log lines on standard error: one line an event, and nothing in it that could
//! drive the terminal, since part of the text comes from device processes.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cellblock_devices::protocol::LogLevel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::remedy::printable;
use crate::terminal;

/// Environment variable with the level, where no option gives one.
pub const ENV: &str = "CELLBLOCK_LOG";

/// Reads a level as options and the environment spell it.
pub fn level(text: &str) -> Result<LogLevel, String> {
    match text {
        "error" => Ok(LogLevel::Error),
        "warn" => Ok(LogLevel::Warn),
        "info" => Ok(LogLevel::Info),
        "debug" => Ok(LogLevel::Debug),
        "trace" => Ok(LogLevel::Trace),
        other => Err(format!("'{other}' is not one of error, warn, info, debug, trace")),
    }
}

/// The level to log at: the option's, else [`ENV`]'s, else warnings.
pub fn choose(option: Option<LogLevel>) -> Result<LogLevel, String> {
    match (option, std::env::var(ENV)) {
        (Some(level), _) => Ok(level),
        (None, Ok(text)) => {
            level(&text).map_err(|why| format!("environment variable {ENV}: {why}"))
        }
        (None, Err(_)) => Ok(LogLevel::Warn),
    }
}

/// Starts logging to standard error. Later calls change nothing.
pub fn init(level: LogLevel) {
    let filter = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_writer(|| Patient(std::io::stderr()))
        .event_format(OneLine { start: Instant::now(), raw: terminal::is_raw })
        .finish();
    // Fails only where a subscriber is installed, as in a test of a whole program.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// How long a line may wait for whoever reads the log.
const PATIENCE: Duration = Duration::from_millis(20);
/// What a pipe that is ready for writing takes without waiting (PIPE_BUF).
const PIECE: usize = 4096;

/// What happened to the lines before this one.
static READER: Mutex<Reader> = Mutex::new(Reader { is_away: false, lost: 0 });

struct Reader {
    /// It did not make room in time, and is not waited for again until it does.
    is_away: bool,
    lost: u64,
}

/// Writes lines to a reader that may not read, as one that holds a pipe's other end or
/// has stopped a terminal: lines are lost then, because a log must not stop a VM.
struct Patient<W>(W);

impl<W: Write + AsFd> Patient<W> {
    fn has_room(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
        // Asking fails for nothing that could be waited for.
        !matches!(poll(&mut fds, timeout), Ok(0))
    }

    fn write_line(&mut self, reader: &mut Reader, line: &[u8]) -> io::Result<()> {
        for piece in line.chunks(PIECE) {
            let limit = if reader.is_away { Duration::ZERO } else { PATIENCE };
            reader.is_away = !self.has_room(limit);
            if reader.is_away {
                reader.lost += 1;
                return Ok(());
            }
            self.0.write_all(piece)?;
        }
        Ok(())
    }
}

impl<W: Write + AsFd> Write for Patient<W> {
    /// Takes a whole line at a time, which is what the formatter gives.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut reader = READER.lock().unwrap_or_else(PoisonError::into_inner);
        if reader.lost > 0 && self.has_room(Duration::ZERO) {
            let lost = std::mem::take(&mut reader.lost);
            let end = if terminal::is_raw() { "\r\n" } else { "\n" };
            let note = format!("cellblock: {lost} log lines were lost: nobody read them{end}");
            self.write_line(&mut reader, note.as_bytes())?;
        }
        self.write_line(&mut reader, line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // standard error keeps nothing back
    }
}

/// Tells the user something that is no event: one line, whatever the level.
pub fn tell(line: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    // With standard error closed there is nobody to tell.
    let _ = write!(std::io::stderr(), "cellblock: {}{end}", printable(line));
}

/// `cellblock[0.012] warn: text key=value`.
struct OneLine {
    start: Instant,
    /// Whether the terminal needs a carriage return of its own.
    raw: fn() -> bool,
}

impl<S, N> FormatEvent<S, N> for OneLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        ctx.format_fields(Writer::new(&mut text), event)?;
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let end = if (self.raw)() { "\r\n" } else { "\n" };
        let seconds = self.start.elapsed().as_secs_f64();
        write!(writer, "cellblock[{seconds:.3}] {level}: {}{end}", printable(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn line(raw: fn() -> bool, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .event_format(OneLine { start: Instant::now(), raw })
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_event_is_one_harmless_line() {
        let text = line(|| false, || tracing::warn!(disk = "disk0", "said: {}", "a\nb\x1b[2J"));
        assert!(text.starts_with("cellblock["), "{text}");
        assert!(text.contains("] warn: said: a b"), "{text}");
        assert!(text.ends_with("[2J disk=\"disk0\"\n") && !text.contains('\x1b'), "{text:?}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_raw_terminal_gets_its_carriage_return() {
        assert!(line(|| true, || tracing::error!("x")).ends_with("error: x\r\n"));
    }

    #[test]
    fn a_reader_that_does_not_read_loses_lines_and_delays_nobody() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut log = Patient(writer);
        let line = [b'x'; 999];
        let start = Instant::now();
        for _ in 0..10_000 {
            log.write_all(&line).unwrap();
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let mut seen = vec![0; 1 << 20];
        let kept = reader.read(&mut seen).unwrap() / line.len();
        log.write_all(b"and on").unwrap();
        let count = reader.read(&mut seen).unwrap();
        let text = String::from_utf8(seen[..count].to_vec()).unwrap();
        assert!(text.contains(&format!("{} log lines were lost", 10_000 - kept)), "{text:?}");
        assert!(text.ends_with("and on"), "{text:?}");
    }

    #[test]
    fn levels_are_the_documented_ones() {
        assert_eq!(level("debug"), Ok(LogLevel::Debug));
        assert!(level("loud").unwrap_err().contains("error, warn, info, debug, trace"));
    }
}
