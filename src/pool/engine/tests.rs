//! The rules, with a factory that fails where it is told to.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(80);

/// What the factory is told, and what it knows.
#[derive(Default)]
struct Knobs {
    fails: AtomicBool,
    panics: AtomicBool,
    reset_fails: AtomicBool,
    slow_us: AtomicU64,
    attempts: AtomicUsize,
    /// Shells that exist.
    there: AtomicUsize,
    /// Shells that were told to end.
    dismissed: AtomicUsize,
    /// Those of them that have died.
    dead: Mutex<HashSet<u64>>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Knobs>);

struct Thing {
    id: u64,
    resets: u32,
    knobs: Arc<Knobs>,
}

impl Drop for Thing {
    fn drop(&mut self) {
        self.knobs.there.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the oven is cold")]
struct Cold;

impl Factory for Fake {
    type Shell = Thing;
    type Error = Cold;

    fn make(&self, id: u64, _: &dyn Fn() -> bool) -> Result<Thing, Cold> {
        self.0.attempts.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(self.0.slow_us.load(Ordering::SeqCst)));
        assert!(!self.0.panics.load(Ordering::SeqCst), "told to panic");
        if self.0.fails.load(Ordering::SeqCst) {
            return Err(Cold);
        }
        self.0.there.fetch_add(1, Ordering::SeqCst);
        Ok(Thing { id, resets: 0, knobs: self.0.clone() })
    }

    fn is_alive(&self, thing: &mut Thing) -> bool {
        !self.0.dead.lock().unwrap().contains(&thing.id)
    }

    fn reset(&self, thing: &mut Thing) -> Result<(), Cold> {
        assert!(!self.0.panics.load(Ordering::SeqCst), "told to panic");
        if self.0.reset_fails.load(Ordering::SeqCst) {
            return Err(Cold);
        }
        thing.resets += 1;
        Ok(())
    }

    fn dismiss(&self, _: &mut Thing) {
        self.0.dismissed.fetch_add(1, Ordering::SeqCst);
    }

    fn destroy(&self, thing: Thing) {
        drop(thing);
        assert!(!self.0.panics.load(Ordering::SeqCst), "told to panic");
    }
}

fn limits(min_size: usize, max_size: usize, max_live: usize) -> Limits {
    Limits { min_size, max_size, max_live, memory: 1 << 20, charge: 1 }
}

fn pool_with(limits: Limits, release: Release) -> (Engine<Fake>, Arc<Knobs>) {
    let fake = Fake::default();
    let knobs = fake.0.clone();
    let options = Options { limits, release, makers: 2, enders: 2 };
    (Engine::new(fake, options).unwrap(), knobs)
}

fn pool(min_size: usize, max_size: usize, max_live: usize) -> (Engine<Fake>, Arc<Knobs>) {
    pool_with(limits(min_size, max_size, max_live), Release::Destroy)
}

fn claim(pool: &Engine<Fake>, patience: Duration) -> Result<Lease<Fake>, ClaimError<Cold>> {
    pool.claim(Wish { patience, ..Wish::default() })
}

#[track_caller]
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Everything is given back and gone, and the books have always balanced.
#[track_caller]
fn all_gone(pool: Engine<Fake>, knobs: &Knobs) {
    knobs.panics.store(false, Ordering::SeqCst);
    assert!(pool.drain(true, LONG), "{:?}", pool.stats().books);
    let stats = pool.stats();
    assert_eq!((stats.violations, stats.last_violation), (0, None));
    assert_eq!(stats.books.waiting, 0);
    assert_eq!(knobs.there.load(Ordering::SeqCst), 0, "shells are left");
}

#[test]
fn a_shell_is_there_before_it_is_wanted_and_another_takes_its_place() {
    let (pool, knobs) = pool(2, 4, 8);
    eventually("two shells", || pool.idle_count() == 2);
    let first = claim(&pool, Duration::ZERO).expect("there is one");
    eventually("another", || pool.idle_count() == 2);
    let books = pool.stats().books;
    assert_eq!((books.live, books.hits, books.misses, books.made), (1, 1, 0, 3));
    let id = first.id();
    drop(first);
    eventually("its end", || pool.stats().books.live == 0);
    // It is not used again.
    let again = claim(&pool, LONG).expect("there is one");
    assert_ne!(again.id(), id);
    drop(again);
    all_gone(pool, &knobs);
}

#[test]
fn without_a_shell_one_is_made_on_demand() {
    let (pool, knobs) = pool(0, 1, 8);
    std::thread::sleep(SHORT);
    assert_eq!(knobs.attempts.load(Ordering::SeqCst), 0, "made for nobody");
    let lease = claim(&pool, LONG).expect("made");
    let books = pool.stats().books;
    assert_eq!((books.hits, books.misses, books.made), (0, 1, 1));
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn no_more_are_live_than_may_be_and_the_first_to_wait_is_the_first_to_be_served() {
    let (pool, knobs) = pool(1, 1, 1);
    let first = claim(&pool, LONG).expect("one");
    let (told, served) = channel();
    let mut waiting = Vec::new();
    for n in 0..5 {
        let (own, told) = (pool.clone(), told.clone());
        waiting.push(std::thread::spawn(move || {
            let lease = claim(&own, LONG).expect("its turn");
            told.send(n).unwrap();
            drop(lease);
        }));
        // One after the other.
        eventually("its wait", || pool.stats().books.waiting == n + 1);
        assert_eq!(pool.stats().books.live, 1);
    }
    drop(first);
    let order: Vec<usize> = served.iter().take(5).collect();
    assert_eq!(order, [0, 1, 2, 3, 4]);
    waiting.into_iter().for_each(|thread| thread.join().unwrap());
    all_gone(pool, &knobs);
}

#[test]
fn a_claim_that_waits_too_long_says_what_for() {
    let (pool, knobs) = pool(0, 1, 1);
    let lease = claim(&pool, LONG).expect("one");
    let begun = Instant::now();
    let error = claim(&pool, SHORT).expect_err("it is in use");
    assert!(begun.elapsed() >= SHORT && begun.elapsed() < LONG / 4, "{:?}", begun.elapsed());
    let text = error.to_string();
    assert!(text.contains("1 of 1 are in use") && text.contains("0 claims came first"), "{text}");
    let books = pool.stats().books;
    assert_eq!((books.timeouts, books.waiting, books.live), (1, 0, 1));
    drop(lease);
    drop(claim(&pool, LONG).expect("given back"));
    all_gone(pool, &knobs);
}

#[test]
fn who_is_gone_does_not_wait() {
    let (pool, knobs) = pool(0, 1, 1);
    let lease = claim(&pool, LONG).expect("one");
    let gone = || false;
    let wish = Wish { patience: LONG, wanted: Some(&gone), ..Wish::default() };
    assert!(matches!(pool.claim(wish), Err(ClaimError::Abandoned)));
    assert_eq!(pool.stats().books.abandoned, 1);
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn a_shell_that_cannot_be_made_is_an_error_for_who_waits_and_the_refill_goes_on() {
    let (pool, knobs) = pool(0, 2, 4);
    knobs.fails.store(true, Ordering::SeqCst);
    let error = claim(&pool, LONG).expect_err("it cannot be made");
    assert!(crate::remedy::chain(&error).contains("making a VM: the oven is cold"), "{error}");
    let stats = pool.stats();
    assert_eq!((stats.books.make_failures, stats.books.refused), (1, 1));
    assert_eq!(stats.last_error.as_deref(), Some("the oven is cold"));
    all_gone(pool, &knobs);

    let (pool, knobs) = self::pool(2, 2, 4);
    eventually("two", || pool.idle_count() == 2);
    knobs.fails.store(true, Ordering::SeqCst);
    let before = knobs.attempts.load(Ordering::SeqCst);
    let lease = claim(&pool, LONG).expect("made before");
    eventually("a failure", || pool.stats().books.make_failures > 0);
    assert!(pool.stats().pause.is_some());
    std::thread::sleep(FIRST_PAUSE * 4);
    let tried = knobs.attempts.load(Ordering::SeqCst) - before;
    assert!((2..=5).contains(&tried), "it does not back off, or does not go on: {tried}");
    knobs.fails.store(false, Ordering::SeqCst);
    eventually("the refill", || pool.idle_count() == 2);
    assert_eq!(pool.stats().pause, None);
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn each_failure_is_told_to_one_of_those_who_wait() {
    let (pool, knobs) = pool(0, 2, 8);
    knobs.fails.store(true, Ordering::SeqCst);
    knobs.slow_us.store(2000, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert!(matches!(claim(&pool, LONG), Err(ClaimError::Make(_)))));
        }
    });
    let books = pool.stats().books;
    assert_eq!((books.refused, books.timeouts), (6, 0));
    assert!(books.make_failures >= 6);
    all_gone(pool, &knobs);
}

#[test]
fn a_failed_restore_gives_its_place_back() {
    let (pool, knobs) = pool_with(limits(0, 1, 1), Release::Reset);
    let lease = claim(&pool, LONG).expect("one");
    let id = lease.id();
    lease.spoilt();
    let again = claim(&pool, LONG).expect("its place is free");
    assert_ne!(again.id(), id, "a spoilt shell was used again");
    assert_eq!(pool.stats().books.restore_failures, 1);
    drop(again);
    all_gone(pool, &knobs);
}

#[test]
fn no_shell_is_begun_that_memory_would_not_do_for() {
    let limits = Limits { memory: 3, ..limits(1, 8, 8) };
    let (pool, knobs) = pool_with(limits, Release::Destroy);
    let held: Vec<_> = (0..3).map(|_| claim(&pool, LONG).expect("memory for three")).collect();
    assert_eq!(pool.idle_count(), 0);
    let error = claim(&pool, SHORT).expect_err("memory is in use").to_string();
    assert!(error.contains("memory is all in use"), "{error}");
    assert_eq!(knobs.attempts.load(Ordering::SeqCst), 3);
    drop(held);
    eventually("the refill", || pool.idle_count() == 1);
    all_gone(pool, &knobs);
}

#[test]
fn warming_makes_as_many_as_there_may_be() {
    let (pool, knobs) = pool(0, 3, 8);
    assert_eq!(pool.warm(2), 2);
    assert_eq!(pool.warm(9), 3);
    assert_eq!(pool.idle_count(), 3);
    knobs.dead.lock().unwrap().extend(1..=3);
    knobs.fails.store(true, Ordering::SeqCst);
    eventually("their end", || pool.idle_count() == 0);
    assert_eq!(pool.warm(3), 0, "it says how far it came");
    all_gone(pool, &knobs);
}

#[test]
fn warming_goes_on_after_a_claim_and_beside_another() {
    let (pool, knobs) = pool(0, 4, 8);
    assert_eq!(pool.warm(1), 1);
    // The refill leaves the processors to the claim for a moment.
    let lease = claim(&pool, Duration::ZERO).expect("there is one");
    assert_eq!(pool.warm(2), 2);
    drop(lease);
    // Two at once, each for its own.
    knobs.slow_us.store(20_000, Ordering::SeqCst);
    knobs.dead.lock().unwrap().extend(1..=3);
    eventually("their end", || pool.idle_count() == 0);
    std::thread::scope(|scope| {
        let few = scope.spawn(|| pool.warm(1));
        let many = scope.spawn(|| pool.warm(4));
        assert!(few.join().unwrap() >= 1);
        assert_eq!(many.join().unwrap(), 4);
    });
    all_gone(pool, &knobs);
}

#[test]
fn the_dead_are_replaced_and_never_handed_out() {
    let (pool, knobs) = pool(2, 2, 8);
    eventually("two", || pool.idle_count() == 2);
    knobs.dead.lock().unwrap().extend([1, 2]);
    let lease = claim(&pool, LONG).expect("another");
    assert!(lease.id() > 2);
    eventually("others", || pool.idle_count() == 2);
    knobs.dead.lock().unwrap().extend(3..lease.id());
    knobs.dead.lock().unwrap().extend(lease.id() + 1..20);
    eventually("the refill, without a claim", || pool.stats().books.lost >= 4);
    knobs.dead.lock().unwrap().clear();
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn shells_that_die_as_soon_as_they_are_made_are_made_less_and_less_often() {
    let (pool, knobs) = pool(2, 2, 8);
    knobs.dead.lock().unwrap().extend(1..100);
    eventually("a long pause", || pool.stats().pause > Some(Duration::from_secs(1)));
    assert!(pool.stats().last_error.is_some_and(|error| error.contains("as soon as")));
    assert!(knobs.attempts.load(Ordering::SeqCst) < 20);
    // Who waits for one is not made to wait for that.
    knobs.dead.lock().unwrap().clear();
    let lease = claim(&pool, LONG).expect("they live");
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn a_vm_that_has_ended_by_itself_is_no_failed_reset() {
    let (pool, knobs) = pool_with(limits(0, 1, 1), Release::Reset);
    let lease = claim(&pool, LONG).expect("one");
    knobs.dead.lock().unwrap().insert(lease.id());
    drop(lease);
    eventually("its end", || pool.stats().books.returned == 1);
    assert_eq!((pool.stats().books.resets, pool.stats().books.reset_failures), (0, 0));
    all_gone(pool, &knobs);
}

#[test]
fn a_claim_whose_shell_was_dead_comes_before_others() {
    let (pool, knobs) = pool(0, 1, 1);
    let lease = claim(&pool, LONG).expect("one");
    let (told, served) = channel();
    std::thread::scope(|scope| {
        for first in [false, true] {
            let (own, told) = (pool.clone(), told.clone());
            scope.spawn(move || {
                let wish = Wish { patience: LONG, first, ..Wish::default() };
                let lease = own.claim(wish).expect("its turn");
                told.send(first).unwrap();
                drop(lease);
            });
            let there = if first { 2 } else { 1 };
            eventually("its wait", || pool.stats().books.waiting == there);
        }
        drop(lease);
        assert_eq!(served.iter().take(2).collect::<Vec<_>>(), [true, false]);
    });
    let books = pool.stats().books;
    assert_eq!((books.claims, books.retries), (2, 1), "another shell is no other claim");
    all_gone(pool, &knobs);
}

#[test]
fn those_who_come_before_others_keep_their_order_and_the_time_they_have_waited() {
    let (pool, knobs) = pool(0, 1, 1);
    let lease = claim(&pool, LONG).expect("one");
    let (told, served) = channel();
    std::thread::scope(|scope| {
        for n in 0..3 {
            let (own, told) = (pool.clone(), told.clone());
            scope.spawn(move || {
                let wish = Wish { patience: LONG, first: true, ..Wish::default() };
                let lease = own.claim(wish).expect("its turn");
                told.send(n).unwrap();
                drop(lease);
            });
            eventually("its wait", || pool.stats().books.waiting == n + 1);
        }
        // One that has waited since long ago does not wait for long.
        let begun = Instant::now();
        let before = begun.checked_sub(LONG - SHORT);
        let late = Wish { patience: LONG, first: true, begun: before, ..Wish::default() };
        match pool.claim(late) {
            Err(ClaimError::TimedOut { waited, .. }) => assert!(waited >= LONG, "{waited:?}"),
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < LONG / 4);
        drop(lease);
        assert_eq!(served.iter().take(3).collect::<Vec<_>>(), [0, 1, 2]);
    });
    all_gone(pool, &knobs);
}

#[test]
fn a_drained_pool_answers_those_who_wait_and_ends_with_the_last_vm() {
    let (pool, knobs) = pool(1, 2, 1);
    let lease = claim(&pool, LONG).expect("one");
    let own = pool.clone();
    let waiting = std::thread::spawn(move || claim(&own, LONG).map(drop));
    eventually("its wait", || pool.stats().books.waiting == 1);
    assert!(pool.drain(false, LONG));
    assert!(matches!(waiting.join().unwrap(), Err(ClaimError::Draining)));
    assert!(matches!(claim(&pool, LONG), Err(ClaimError::Draining)));
    assert_eq!((pool.idle_count(), pool.stats().books.live), (0, 1));
    assert!(!pool.drain(true, SHORT), "one is live");
    assert_eq!(pool.warm(2), 0);
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn a_vm_outlives_the_pool_and_its_end_is_the_end_of_all() {
    let (pool, knobs) = pool(2, 2, 4);
    let lease = claim(&pool, LONG).expect("one");
    drop(pool);
    eventually("the end of idle ones", || knobs.there.load(Ordering::SeqCst) == 1);
    drop(lease);
    eventually("the end of all", || knobs.there.load(Ordering::SeqCst) == 0);
    // The threads hold what is left.
    eventually("the end of the threads", || Arc::strong_count(&knobs) == 1);
}

#[test]
fn a_reset_shell_is_used_again_and_one_that_cannot_be_is_destroyed() {
    let (pool, knobs) = pool_with(limits(0, 1, 1), Release::Reset);
    let lease = claim(&pool, LONG).expect("one");
    let id = lease.id();
    drop(lease);
    eventually("the reset", || pool.idle_count() == 1);
    let lease = claim(&pool, LONG).expect("the same");
    assert_eq!((lease.id(), lease.get().unwrap().resets), (id, 1));
    knobs.reset_fails.store(true, Ordering::SeqCst);
    drop(lease);
    eventually("its end", || knobs.there.load(Ordering::SeqCst) == 0);
    let books = pool.stats().books;
    assert_eq!((books.resets, books.reset_failures, books.returned), (1, 1, 1));
    assert_eq!((books.hits, books.misses), (1, 1));
    all_gone(pool, &knobs);
}

#[test]
fn what_was_made_for_one_claim_is_nobody_elses() {
    let (pool, knobs) = pool_with(limits(0, 1, 1), Release::Reset);
    let mut lease = claim(&pool, LONG).expect("one");
    let id = lease.id();
    lease.keep_from_others();
    drop(lease);
    let lease = claim(&pool, LONG).expect("one");
    assert_ne!(lease.id(), id, "it was reset and used again");
    assert_eq!((pool.stats().books.resets, pool.stats().books.returned), (0, 1));
    drop(lease);
    all_gone(pool, &knobs);
}

#[test]
fn a_panic_of_the_factory_loses_nothing() {
    let (pool, knobs) = pool_with(limits(0, 1, 2), Release::Reset);
    let (one, other) = (claim(&pool, LONG).unwrap(), claim(&pool, LONG).unwrap());
    knobs.panics.store(true, Ordering::SeqCst);
    assert!(matches!(claim(&pool, SHORT), Err(ClaimError::TimedOut { .. })), "two are live");
    drop(one); // neither reset nor destroyed without a panic
    eventually("its end", || pool.stats().books.returned == 1);
    assert!(matches!(claim(&pool, LONG), Err(ClaimError::Panicked)));
    knobs.panics.store(false, Ordering::SeqCst);
    drop(claim(&pool, LONG).expect("all is well again"));
    drop(other);
    all_gone(pool, &knobs);
}

/// Everything at once: eight threads, and whatever can fail does.
#[test]
fn the_books_balance_whatever_fails() {
    for release in [Release::Destroy, Release::Reset] {
        let limits = Limits { memory: 9, ..limits(2, 4, 5) };
        let (pool, knobs) = pool_with(limits, release);
        knobs.slow_us.store(300, Ordering::SeqCst);
        let (stop, calm) = (AtomicBool::new(false), AtomicBool::new(false));
        let answers = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (pool, stop, calm, answers) = (&pool, &stop, &calm, &answers);
                scope.spawn(move || {
                    let mut n = thread;
                    while !stop.load(Ordering::Relaxed) {
                        while calm.load(Ordering::Relaxed) {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        n = n.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let patience = Duration::from_micros(n >> 40 & 0xfff);
                        let result = claim(pool, patience);
                        answers.fetch_add(1, Ordering::Relaxed);
                        match (result, n >> 60) {
                            (Ok(lease), 0..3) => lease.spoilt(),
                            (Ok(lease), 3..8) => {
                                std::thread::sleep(Duration::from_micros(n >> 30 & 0x1ff));
                                drop(lease);
                            }
                            _ => {}
                        }
                    }
                });
            }
            let end = Instant::now() + Duration::from_millis(1500);
            let mut n = 0;
            while Instant::now() < end {
                n += 1;
                knobs.fails.store(n % 3 == 0, Ordering::SeqCst);
                knobs.reset_fails.store(n % 4 == 0, Ordering::SeqCst);
                let last = pool.stats().books.started;
                knobs.dead.lock().unwrap().insert(last + 1);
                // Now and then the refill has time to get ahead.
                calm.store(n % 32 == 0, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(if n % 32 == 0 { 40 } else { 3 }));
            }
            calm.store(false, Ordering::Relaxed);
            stop.store(true, Ordering::Relaxed);
        });
        let books = pool.stats().books;
        assert_eq!(books.claims, answers.load(Ordering::Relaxed));
        assert!(books.lost > 0 && books.restore_failures > 0 && books.timeouts > 0, "{books:?}");
        assert!(books.hits > 0 && books.misses > 0 && books.make_failures > 0, "{books:?}");
        assert_eq!(books.resets > 0, release == Release::Reset);
        all_gone(pool, &knobs);
    }
}

/// What a claim takes is not made longer by the making of the next shell.
#[test]
fn a_refill_waits_until_the_claim_was_carried_out() {
    let (pool, knobs) = pool(1, 1, 9);
    assert_eq!(pool.warm(1), 1);
    let made = || knobs.attempts.load(Ordering::SeqCst);
    for (so_far, is_told) in [(1, false), (2, true)] {
        eventually("a shell", || pool.idle_count() == 1);
        // What is left of the quiet after the last one.
        std::thread::sleep(CARRY + 2 * QUIET);
        let begun = Instant::now();
        let lease = claim(&pool, LONG).unwrap();
        let carried_out = Instant::now();
        if is_told {
            pool.note_duration(Duration::ZERO);
        }
        eventually("a refill", || made() > so_far);
        let waited = if is_told { carried_out.elapsed() } else { begun.elapsed() };
        assert!(waited >= if is_told { QUIET } else { CARRY }, "{waited:?}");
        drop(lease);
    }
}

/// Nobody waits for those who destroy: what is given back stops at once.
#[test]
fn what_is_given_back_is_told_to_end_at_once() {
    let (pool, knobs) = pool(0, 0, 9);
    for ended in 1..=3 {
        drop(claim(&pool, LONG).unwrap());
        assert_eq!(knobs.dismissed.load(Ordering::SeqCst), ended);
    }
    let (pool, knobs) = pool_with(limits(0, 1, 9), Release::Reset);
    drop(claim(&pool, LONG).unwrap());
    assert_eq!(knobs.dismissed.load(Ordering::SeqCst), 0, "it is used again");
    claim(&pool, LONG).unwrap().spoilt();
    assert_eq!(knobs.dismissed.load(Ordering::SeqCst), 1);
}
