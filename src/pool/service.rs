//! A pool for other programs: a socket at which VMs are claimed and held.
//!
//! A client asks for one by a line of JSON and has it for as long as its connection lives: what
//! ends the connection, its own death included, gives the VM back. Clients are of the user who
//! serves, or root. A thread waits on each of them; nothing that a guest does comes by here.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | the lines |
//! | [`place`] | the socket's path and the VMs' directory, taken over from a service that died |
//! | `descriptors` | how many clients there may be |
//! | `connection` | one client |
//! | [`client`] | the client's end |

pub mod client;
mod connection;
mod descriptors;
pub mod place;
pub mod protocol;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::{BaseConfig, PoolConfig, PoolError, RestorePool};
use crate::logging;
use crate::remedy::{Remedy, printable};
use crate::slice;
use crate::vmm::signals::Signals;
use place::{Place, PlaceError};
use protocol::Answer;

/// How often a service that drains looks whether its last VM is gone, in milliseconds.
const LOOK: u8 = 20;
/// How long VMs may take to end with the service.
const END_LIMIT: Duration = Duration::from_secs(20);

/// A service that cannot be, or that had to end.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say what each is
pub enum ServeError {
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("some VMs did not end within {} s", END_LIMIT.as_secs())]
    Left,
}

impl Remedy for ServeError {
    fn remedy(&self) -> Option<String> {
        match self {
            ServeError::Place(error) => error.remedy(),
            ServeError::Pool(error) => error.remedy(),
            _ => None,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::System { what, source }
}

/// What all connections share.
struct Shared {
    pool: RestorePool,
    /// By number, to end them.
    clients: Mutex<Vec<(usize, Arc<UnixStream>)>>,
    count: AtomicUsize,
    most_clients: usize,
    /// Rung when it may be time to end.
    bell: EventFd,
    draining: AtomicBool,
    timeout: Duration,
}

/// Serves until a signal, or until it was drained and the last VM is given back.
pub fn serve(
    control: &std::path::Path,
    mut base: BaseConfig,
    config: PoolConfig,
) -> Result<(), ServeError> {
    // Before there are threads, which are to have them blocked too.
    let mut signals = Signals::install().map_err(system("taking signals over"))?;
    let place = Place::take(control)?;
    base.directory = Some(place.directory().to_path_buf());
    let timeout = config.acquire_timeout;
    let wanted = config.min_size;
    let shells = config.max_size.saturating_add(config.max_live);
    let most_clients = descriptors::clients(descriptors::raise(), shells);
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = EventFd::from_flags(flags).map_err(|e| system("creating an event")(e.into()))?;
    let pool = RestorePool::new(base, config)?;
    // What no shell can be made of is better known now than at the first claim.
    if !warm(&pool, wanted, &bell, &mut signals)? {
        return Ok(());
    }
    let shared = Arc::new(Shared {
        pool,
        clients: Mutex::default(),
        count: AtomicUsize::new(0),
        most_clients,
        bell,
        draining: AtomicBool::new(false),
        timeout,
    });
    let mut listener = place.listen()?;
    logging::tell(&format!("serving VMs on {}", control.display()));
    let result = shared.accept_until_the_end(&mut listener, &mut signals);
    drop(listener);
    shared.end().and(result)
}

/// Has the first shells made. False where a signal came first: there are none then.
fn warm(
    pool: &RestorePool,
    wanted: usize,
    bell: &EventFd,
    signals: &mut Signals,
) -> Result<bool, ServeError> {
    std::thread::scope(|scope| {
        let warming = scope.spawn(|| {
            let ready = pool.warm(wanted);
            let _ = bell.write(1); // it fails only when it rings already
            ready
        });
        loop {
            let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [watch(bell.as_fd()), watch(signals.as_fd())];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(system("waiting for shells")(e.into())),
            }
            let [rung, signalled] =
                fds.map(|fd| fd.revents().is_some_and(|flags| flags.contains(PollFlags::POLLIN)));
            if signalled && signals.take() {
                tracing::info!("stopping on a signal");
                pool.drain();
                return Ok(false);
            }
            if rung {
                break;
            }
        }
        // It does not panic; if it did, there would be none.
        let ready = warming.join().unwrap_or(0);
        if ready < wanted {
            let stats = pool.stats();
            let why = stats.last_error.unwrap_or("there is no memory for more".into());
            tracing::warn!("{ready} of {wanted} shells could be made: {why}");
        }
        Ok(true)
    })
}

impl Shared {
    fn accept_until_the_end(
        self: &Arc<Self>,
        listener: &mut place::Listener,
        signals: &mut Signals,
    ) -> Result<(), ServeError> {
        let mut number = 0;
        loop {
            if self.draining.load(Ordering::Acquire) && self.pool.stats().in_use == 0 {
                return Ok(());
            }
            let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds =
                [watch(listener.as_fd()), watch(signals.as_fd()), watch(self.bell.as_fd())];
            // The end of the last VM does not ring.
            let draining = self.draining.load(Ordering::Acquire);
            let limit = if draining { PollTimeout::from(LOOK) } else { PollTimeout::NONE };
            match poll(&mut fds, limit) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(system("waiting for clients")(e.into())),
            }
            let readable =
                fds.map(|fd| fd.revents().is_some_and(|flags| flags.contains(PollFlags::POLLIN)));
            if readable[1] && signals.take() {
                tracing::info!("stopping on a signal");
                return Ok(());
            }
            let _ = self.bell.read(); // it only rings
            if readable[0]
                && let Some(stream) = listener.accept()
            {
                number += 1;
                self.admit(number, stream);
            }
        }
    }

    fn admit(self: &Arc<Self>, number: usize, stream: UnixStream) {
        let refuse = |message: String, remedy: &str| {
            let answer = Answer::Error { message, remedy: Some(remedy.into()) };
            // As much as fits a fresh socket, which is all of it.
            let _ = (&stream).write(&protocol::line(&answer));
        };
        match getsockopt(&stream, PeerCredentials) {
            Ok(who) if who.uid() != geteuid().as_raw() && who.uid() != 0 => {
                tracing::warn!(uid = who.uid(), pid = who.pid(), "a client was refused");
                let uid = who.uid();
                return refuse(
                    format!("user id {uid} may not use this pool"),
                    "run the command as the pool's user or as root",
                );
            }
            Err(_) => return,
            Ok(_) => {}
        }
        if self.count.load(Ordering::Acquire) >= self.most_clients {
            return refuse(
                format!("the pool has {} clients already", self.most_clients),
                "end one of them, or try again later",
            );
        }
        let stream = Arc::new(stream);
        self.clients().push((number, stream.clone()));
        self.count.fetch_add(1, Ordering::AcqRel);
        let shared = self.clone();
        let thread = std::thread::Builder::new().name("pool-client".into());
        let started = thread.spawn(move || {
            // What it does is short, and somebody waits for it.
            slice::shorten_own();
            connection::run(&shared, &stream);
            shared.gone(number);
        });
        if let Err(error) = started {
            tracing::warn!(%error, "a client was turned away");
            self.gone(number);
        }
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<(usize, Arc<UnixStream>)>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self, number: usize) {
        self.clients().retain(|(other, _)| *other != number);
        self.count.fetch_sub(1, Ordering::AcqRel);
        self.ring();
    }

    fn ring(&self) {
        let _ = self.bell.write(1); // it fails only when it rings already
    }

    /// The pool is drained: the service ends with its last VM.
    fn end_when_empty(&self) {
        self.draining.store(true, Ordering::Release);
        self.ring();
    }

    /// Takes every VM back.
    fn end(&self) -> Result<(), ServeError> {
        self.draining.store(true, Ordering::Release);
        for (_, stream) in &*self.clients() {
            let _ = stream.shutdown(std::net::Shutdown::Both); // one that is gone is what we want
        }
        match self.pool.drain_all(END_LIMIT) {
            true => Ok(()),
            false => Err(ServeError::Left),
        }
    }
}

/// A line that a client sent, as far as it may be long.
fn complaint(what: &str) -> Answer {
    Answer::Error { message: printable(what), remedy: None }
}

/// How long something took, for an answer.
fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
