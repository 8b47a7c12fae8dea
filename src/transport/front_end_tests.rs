//! The front end before back ends that lack something, lie, hang up, or say nothing.

use std::time::Instant;

use super::*;
use crate::event::event;
use crate::transport::script::{self, Peer};

const CONFIG_LEN: u32 = 8;
const NEEDS: Needs = Needs { config_len: CONFIG_LEN, advice: &[6..7, 7..8], least: 1, most: 1 };

fn front_end() -> (FrontEnd, Peer) {
    let (near, far) = UnixStream::pair().expect("pair");
    let ram = GuestRam::new(32 << 20).expect("ram");
    let front_end = FrontEnd::start("disk0", near, NEEDS, ram, || Ok(())).expect("thread");
    (front_end, Peer(far))
}

/// Opens in front of a back end that answers by `answer` until the connection ends.
fn open(
    answer: impl Fn(&mut Peer, &script::Message) + Send + 'static,
) -> Result<DeviceInfo, FrontEndError> {
    let (front_end, mut peer) = front_end();
    let thread = std::thread::spawn(move || {
        while let Some(message) = peer.next() {
            answer(&mut peer, &message);
        }
    });
    let result = front_end.wait(&front_end.open());
    drop(front_end);
    thread.join().expect("the connection ends with the front end");
    result
}

fn activation() -> Activation {
    let event = || Arc::new(event().expect("event"));
    let config = QueueConfig { size: 8, ready: true, desc: 0x1000, avail: 0x2000, used: 0x3000 };
    let queue =
        QueueSetup { index: 0, config, base: 0, kick: event(), call: event(), err: event() };
    Activation { features: 1 << 32, queues: vec![queue] }
}

/// A front end that has negotiated, and its back end.
fn opened() -> (FrontEnd, Peer) {
    let (front_end, mut peer) = front_end();
    let answer = front_end.open();
    let asked = peer.behave_until(script::GET_CONFIG);
    assert_eq!(
        asked,
        [
            script::SET_OWNER,
            script::GET_FEATURES,
            script::GET_PROTOCOL_FEATURES,
            script::SET_PROTOCOL_FEATURES,
            script::GET_QUEUE_NUM
        ]
    );
    // What was asked for last, by hand: offset, size and flags, then the content.
    let mut config = [0u32, CONFIG_LEN, 0].map(u32::to_le_bytes).concat();
    config.extend_from_slice(b"contents");
    peer.reply_to(script::GET_CONFIG, &config);
    let info = front_end.wait(&answer).expect("negotiation");
    assert_eq!(info.config, b"contents");
    assert_eq!(info.queues, 1);
    (front_end, peer)
}

#[test]
fn only_a_guests_features_pass() {
    let info = open(|peer, message| peer.answer(message, script::FEATURES, script::PROTOCOL, 0))
        .expect("negotiation");
    // Dirty logging, packed rings and protocol features stay behind.
    assert_eq!(info.features, 1 << 32 | 1 << 9);
    assert_eq!(info.config.len(), CONFIG_LEN as usize);
}

#[test]
fn a_back_end_that_lacks_what_we_need_is_refused_by_name() {
    let features = open(|peer, message| peer.answer(message, 1 << 32, script::PROTOCOL, 0));
    let error = features.expect_err("no protocol features").to_string();
    assert!(error.contains("disk0") && error.contains("PROTOCOL_FEATURES"), "{error}");

    let config = open(|peer, message| peer.answer(message, script::FEATURES, 1 << 3, 0));
    let error = config.expect_err("no configuration").to_string();
    assert!(error.contains("disk0") && error.contains("VHOST_USER_PROTOCOL_F_CONFIG"), "{error}");
}

#[test]
fn a_back_end_of_one_queue_need_not_speak_of_queues() {
    let protocol = 1 << 9 | 1 << 3;
    let info = open(move |peer, message| {
        assert_ne!(message.request, script::GET_QUEUE_NUM);
        peer.answer(message, script::FEATURES, protocol, 0);
    });
    assert_eq!(info.expect("negotiation").queues, 1);
}

#[test]
fn lies_in_answers_end_the_exchange() {
    for wrong in [script::GET_FEATURES, script::GET_PROTOCOL_FEATURES, script::GET_CONFIG] {
        // An answer to something else, one too short, and one of absurd length.
        for lie in 0..3 {
            let result = open(move |peer, message| {
                if message.request != wrong {
                    return peer.answer(message, script::FEATURES, script::PROTOCOL, 0);
                }
                match lie {
                    0 => peer.reply_to(script::GET_VRING_BASE, &[0; 8]),
                    1 => peer.reply_to(wrong, &[0; 3]),
                    _ => peer.reply_header(wrong, u32::MAX),
                }
                // A stream cannot be made whole again; the front end has to notice alone.
                let _ = peer.0.shutdown(Shutdown::Write);
            });
            let error = result.expect_err("a lie");
            assert!(matches!(error, FrontEndError::Exchange { .. }), "{wrong} {lie}: {error:?}");
        }
    }
}

#[test]
fn a_back_end_that_hangs_up_is_an_error_at_once() {
    let (front_end, peer) = front_end();
    let start = Instant::now();
    let answer = front_end.open();
    drop(peer);
    let error = front_end.wait(&answer).expect_err("nobody there");
    assert!(matches!(error, FrontEndError::Exchange { .. }), "{error:?}");
    assert!(start.elapsed() < DEADLINE / 2);
    // And every job after that.
    assert!(front_end.wait(&front_end.activate(activation())).is_err());
}

#[test]
fn a_silent_back_end_is_cut_off_at_the_deadline() {
    let (front_end, mut peer) = front_end();
    let start = Instant::now();
    let error = front_end.wait(&front_end.open()).expect_err("silence");
    assert!(matches!(error, FrontEndError::Silent { .. }), "{error:?}");
    let took = start.elapsed();
    assert!(took >= DEADLINE && took < 2 * DEADLINE, "{took:?}");
    assert_eq!(peer.listen_to_the_end(), [script::SET_OWNER, script::GET_FEATURES]);
}

#[test]
fn a_start_is_over_when_the_last_message_is_acknowledged() {
    let (front_end, mut peer) = opened();
    let answer = front_end.activate(activation());
    let sent = peer.behave_until(script::SET_VRING_ENABLE);
    assert_eq!(sent[0], script::SET_FEATURES);
    let early = answer.wait(Duration::from_millis(50));
    assert!(matches!(early, Waited::TimedOut), "{early:?}");
    peer.reply_to(script::SET_VRING_ENABLE, &0u64.to_le_bytes());
    front_end.wait(&answer).expect("started");

    // A reset stops what was started, once.
    let answer = front_end.reset();
    let message = peer.next().expect("a message");
    assert_eq!(message.request, script::GET_VRING_BASE);
    peer.answer(&message, 0, 0, 0);
    front_end.wait(&answer).expect("stopped");
    front_end.wait(&front_end.reset()).expect("nothing to stop");
}

/// Nothing of an activation that was refused is in the way of the next.
#[test]
fn a_back_end_that_refuses_a_queue_is_not_started() {
    let (front_end, mut peer) = opened();
    let refused = front_end.activate(activation());
    peer.behave_until(script::SET_VRING_ENABLE);
    peer.reply_to(script::SET_VRING_ENABLE, &1u64.to_le_bytes());
    let message = peer.next().expect("the ring is taken back");
    assert_eq!(message.request, script::GET_VRING_BASE);
    peer.answer(&message, script::FEATURES, script::PROTOCOL, 0);
    let error = front_end.wait(&refused).expect_err("refused");
    assert!(error.to_string().contains("starting a queue of disk0"), "{error}");
    let accepted = front_end.activate(activation());
    peer.behave_until(script::SET_VRING_ENABLE);
    peer.reply_to(script::SET_VRING_ENABLE, &0u64.to_le_bytes());
    front_end.wait(&accepted).expect("the next activation");
}

/// A front end whose ring was stopped at 7 before its back end was lost.
fn lost_at_rest() -> FrontEnd {
    at_rest().0
}

/// A front end that is watched, and whose ring was stopped at 7, with its back end.
fn at_rest() -> (FrontEnd, Peer) {
    let (front_end, mut peer) = opened();
    front_end.watch(Box::new(|_| {}));
    let started = front_end.activate(activation());
    peer.behave_until(script::SET_VRING_ENABLE);
    peer.reply_to(script::SET_VRING_ENABLE, &0u64.to_le_bytes());
    front_end.wait(&started).expect("started");
    let frozen = front_end.freeze();
    assert!(peer.behave_until(script::GET_VRING_BASE).is_empty());
    peer.reply_to(script::GET_VRING_BASE, &[0u32, 7].map(u32::to_le_bytes).concat());
    assert_eq!(front_end.wait(&frozen).expect("at rest"), [(0, 7)]);
    (front_end, peer)
}

/// The far end of another connection, which has said that its configuration is `contents`.
fn introduced(front_end: &FrontEnd, contents: &[u8]) -> Peer {
    let (near, far) = UnixStream::pair().expect("pair");
    let mut peer = Peer(far);
    front_end.reconnect(near).expect("asked");
    peer.behave_until(script::GET_CONFIG);
    let mut config = [0u32, CONFIG_LEN, 0].map(u32::to_le_bytes).concat();
    config.extend_from_slice(contents);
    peer.reply_to(script::GET_CONFIG, &config);
    peer
}

/// The far end of another connection, up to the start of its ring, and where that was set to. Its
/// configuration is another in what is only advice.
fn reconnected(front_end: &FrontEnd) -> (Peer, Vec<u8>) {
    let mut peer = introduced(front_end, b"conten--");
    let base = loop {
        let message = peer.next().expect("the ring is set up");
        if message.request == script::SET_VRING_BASE {
            break message.body;
        }
        peer.answer(&message, script::FEATURES, script::PROTOCOL, 0);
    };
    peer.behave_until(script::SET_VRING_ENABLE);
    peer.reply_to(script::SET_VRING_ENABLE, &0u64.to_le_bytes());
    (peer, base)
}

#[test]
fn rings_at_rest_go_on_where_they_were_over_another_connection() {
    let front_end = lost_at_rest();
    let (_peer, base) = reconnected(&front_end);
    assert_eq!(base, [0u32, 7].map(u32::to_le_bytes).concat());
}

/// A back end that hangs when it is to go on is lost, and the rings run with the next one: whoever
/// thawed them is not told that they never will.
#[test]
fn a_thaw_that_nobody_answers_is_left_to_another_connection() {
    let (front_end, peer) = at_rest();
    assert!(front_end.wait_thawed(&front_end.thaw()).is_ok());
    let (_next, base) = reconnected(&front_end);
    assert_eq!(base, [0u32, 7].map(u32::to_le_bytes).concat());
    drop(peer);
}

/// What a driver was told of its device holds, however often another one is offered.
#[test]
fn a_back_end_that_is_another_is_refused_each_time() {
    let front_end = lost_at_rest();
    for _ in 0..3 {
        let mut peer = introduced(&front_end, b"another!");
        peer.0.set_read_timeout(Some(DEADLINE)).expect("timeout");
        assert!(peer.listen_to_the_end().is_empty(), "it is set up");
    }
    let (_peer, base) = reconnected(&front_end);
    assert_eq!(base, [0u32, 7].map(u32::to_le_bytes).concat());
}

/// A cut that fails for want of a connection stops nothing after it.
#[test]
fn a_freeze_does_not_outlive_its_connection() {
    let front_end = lost_at_rest();
    front_end.wait(&front_end.thaw()).expect("another connection is to do it");
    let error = front_end.wait(&front_end.freeze()).expect_err("nobody there");
    assert!(matches!(error, FrontEndError::Gone { .. }), "{error:?}");
    front_end.wait(&front_end.thaw()).expect("another connection is to do it");
    let (mut peer, _) = reconnected(&front_end);
    front_end.wait(&front_end.thaw()).expect("nothing to do");
    drop(front_end);
    assert!(peer.listen_to_the_end().is_empty(), "something stops the ring");
}
