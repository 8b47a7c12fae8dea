//! Log lines of a device process: sent to the VMM, which decides where they go.
//!
//! A log line never blocks the device. Where the channel is full it is dropped, and
//! the next one that gets through says how many were.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use cellblock_wire::Channel;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::protocol::{FromCell, LogLevel};

/// Longest line, in bytes.
const LONGEST: usize = 1024;

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Sends everything that is logged from now on, down to `level`, over `channel`.
pub(super) fn start(channel: &'static Channel, level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Fails only where one is set already, and a process starts once.
    let _ = tracing::subscriber::set_global_default(Lines { channel, level });
}

/// Sends one line, or counts it as dropped.
pub(super) fn send(channel: &Channel, level: LogLevel, text: &str) {
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if dropped > 0 {
        let message = format!("{dropped} log lines were dropped: the VMM did not keep up");
        if !try_send(channel, LogLevel::Warn, message) {
            DROPPED.fetch_add(dropped + 1, Ordering::Relaxed);
            return;
        }
    }
    if !try_send(channel, level, one_line(text)) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

fn try_send(channel: &Channel, level: LogLevel, message: String) -> bool {
    channel.try_send(&FromCell::Log { level, message }, &[]).unwrap_or(false)
}

/// Control characters become spaces, and the end is cut off where it is too long.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(LONGEST));
    for c in text.chars() {
        if line.len() + c.len_utf8() > LONGEST {
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line
}

struct Lines {
    channel: &'static Channel,
    level: LevelFilter,
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = match *event.metadata().level() {
            Level::ERROR => LogLevel::Error,
            Level::WARN => LogLevel::Warn,
            Level::INFO => LogLevel::Info,
            Level::DEBUG => LogLevel::Debug,
            Level::TRACE => LogLevel::Trace,
        };
        send(self.channel, level, &(text.message + &text.fields));
    }

    // Spans carry nothing here: a device process is one device.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(channel: &Channel) -> (LogLevel, String) {
        match channel.recv::<FromCell>() {
            Ok((FromCell::Log { level, message }, _)) => (level, message),
            other => panic!("{other:?}"),
        }
    }

    // One test: the global subscriber is one of this process.
    #[test]
    fn events_become_lines_and_a_full_channel_drops_them() {
        let (near, far) = Channel::pair().expect("pair");
        let near: &'static Channel = Box::leak(Box::new(near));
        start(near, LogLevel::Info);
        tracing::warn!(queue = 3, name = "disk0", "late\nby {}", 7);
        tracing::debug!("not wanted");
        tracing::info!("{}", "x".repeat(5000));
        assert_eq!(line(&far), (LogLevel::Warn, "late by 7 queue=3 name=\"disk0\"".into()));
        assert_eq!(line(&far), (LogLevel::Info, "x".repeat(LONGEST)));

        for i in 0..5000 {
            tracing::info!("{i} {}", "x".repeat(500));
        }
        let mut got = 0;
        while far.try_recv::<FromCell>().expect("open").is_some() {
            got += 1;
        }
        assert!(got > 0 && got < 5000, "{got}");
        tracing::error!("afterwards");
        let text = format!("{} log lines were dropped: the VMM did not keep up", 5000 - got);
        assert_eq!(line(&far), (LogLevel::Warn, text));
        assert_eq!(line(&far), (LogLevel::Error, "afterwards".into()));
    }
}
