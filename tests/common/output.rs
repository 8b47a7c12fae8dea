//! What a VM says, collected by a thread, waited for with deadlines.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use cellblock::control::client::Client;
use cellblock::control::protocol::{Event, EventKind};

struct State<T> {
    all: T,
    ended: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T: Default> Shared<T> {
    fn new() -> Arc<Shared<T>> {
        let state = Mutex::new(State { all: T::default(), ended: false });
        Arc::new(Shared { state, changed: Condvar::new() })
    }

    fn add(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.state.lock().unwrap().all);
        self.changed.notify_all();
    }

    fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `look` finds something, the source ends, or time is up.
    fn wait<R>(&self, limit: Duration, mut look: impl FnMut(&State<T>) -> Option<R>) -> Option<R> {
        let end = Instant::now() + limit;
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

/// A stream of text. A clone reads on from where this one is.
#[derive(Clone)]
pub struct Output {
    shared: Arc<Shared<Vec<u8>>>,
    /// Where the last thing waited for ended.
    seen: usize,
}

impl Output {
    /// Collects all that comes from `source`, from now until its end.
    pub fn collect(mut source: impl Read + Send + 'static) -> Output {
        let shared: Arc<Shared<Vec<u8>>> = Shared::new();
        let to = shared.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal ends with an error (EIO).
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                to.add(|all| all.extend_from_slice(&buffer[..count]));
            }
            to.end();
        });
        Output { shared, seen: 0 }
    }

    /// Waits for `text` behind what was waited for before; returns the line it is on, as
    /// far as it has come.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Option<String> {
        let (seen, wanted) = (self.seen, text.as_bytes());
        // Where to go on looking: what was searched once is not searched again.
        let mut from = seen;
        let (line, end) = self.shared.wait(limit, |state| {
            let all = &state.all;
            let found = all[from..].windows(wanted.len().max(1)).position(|w| w == wanted);
            let Some(at) = found.map(|at| from + at) else {
                from = from.max(all.len().saturating_sub(wanted.len()));
                return None;
            };
            let end = at + wanted.len();
            let begin = all[..at].iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1);
            let stop = all[end..].iter().position(|b| *b == b'\n').map_or(all.len(), |n| end + n);
            Some((String::from_utf8_lossy(&all[begin..stop]).trim_end().to_string(), end))
        })?;
        self.seen = end;
        Some(line)
    }

    /// As [`Output::wait_for`], and waits for the end of the line too.
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> Option<String> {
        let begun = self.wait_for(text, limit)?;
        let from = self.seen;
        let rest = self.shared.wait(limit, |state| {
            let length = state.all[from..].iter().position(|b| *b == b'\n')?;
            Some(String::from_utf8_lossy(&state.all[from..from + length]).into_owned())
        })?;
        let head = begun.find(text).map_or(0, |at| at + text.len());
        self.seen = from + rest.len();
        Some(format!("{}{}", &begun[..head], rest.trim_end()))
    }

    /// All of it so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.state.lock().unwrap().all).into_owned()
    }

    /// How many bytes have come so far.
    pub fn len(&self) -> usize {
        self.shared.state.lock().unwrap().all.len()
    }

    /// Waits for the end, at most `limit`; returns all of it.
    pub fn finished(&self, limit: Duration) -> String {
        self.shared.wait(limit, |state| state.ended.then_some(()));
        self.text()
    }

    /// Whether everyone who could write has closed.
    pub fn is_finished(&self, limit: Duration) -> bool {
        self.shared.wait(limit, |state| state.ended.then_some(())).is_some()
    }
}

/// Events of a VM.
pub struct Events {
    shared: Arc<Shared<Vec<Event>>>,
}

impl Events {
    /// Collects from a connection that carries events, until the VM ends.
    pub fn collect(mut client: Client) -> Events {
        let shared: Arc<Shared<Vec<Event>>> = Shared::new();
        let to = shared.clone();
        std::thread::spawn(move || {
            while let Ok(Some((event, _))) = client.next_event() {
                to.add(|all| all.push(event));
            }
            to.end();
        });
        Events { shared }
    }

    /// Waits for one that is `wanted`, among all so far and those to come.
    ///
    /// # Errors
    /// Those that came in its place.
    pub fn wait_for(
        &self,
        limit: Duration,
        wanted: impl Fn(&EventKind) -> bool,
    ) -> Result<Event, Vec<Event>> {
        self.shared
            .wait(limit, |state| state.all.iter().find(|event| wanted(&event.kind)).cloned())
            .ok_or_else(|| self.all())
    }

    /// All so far.
    pub fn all(&self) -> Vec<Event> {
        self.shared.state.lock().unwrap().all.clone()
    }
}
