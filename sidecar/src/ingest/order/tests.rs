use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const RUN: u64 = 1_000;

/// A frame of a run; its payload is unlike any other's.
fn frame(run: u64, sequence: u64) -> Frame {
    Frame {
        sequence,
        payload: Bytes::from((run * RUN + sequence).to_le_bytes().to_vec()),
        received_ns: 0,
    }
}

fn steps(order: &mut Order) -> Vec<Step> {
    std::iter::from_fn(|| order.next_step()).collect()
}

fn delivered(run: u64, sequence: u64) -> Step {
    Step::Deliver(frame(run, sequence))
}

fn turn(turn: Turn) -> Step {
    Step::Turn(turn)
}

fn replay(from: u64) -> Step {
    Step::Replay { from }
}

fn order(source: Source) -> Order {
    let mut order = Order::new(source, Limits::default(), None);
    order.opened();
    order
}

/// A stream that has delivered frames 0 to `last` of run 1.
fn running(source: Source, last: u64) -> Order {
    let mut order = order(source);
    order.replay_ended(true);
    for sequence in 0..=last {
        order.live(frame(1, sequence));
    }
    steps(&mut order);
    order
}

#[test]
fn an_engine_that_starts_is_whole_from_its_first_frame() {
    let mut order = order(Source::Live);
    order.live(frame(1, 0));
    assert_eq!(
        steps(&mut order),
        [turn(Turn::Opened), turn(Turn::Whole), delivered(1, 0)]
    );
}

#[test]
fn a_late_reader_asks_for_what_was_before() {
    let mut order = order(Source::Replays);
    assert_eq!(steps(&mut order), [turn(Turn::Opened), replay(0)]);
    order.live(frame(1, 2));
    order.replayed(frame(1, 0));
    order.replayed(frame(1, 1));
    order.replayed(frame(1, 2));
    order.replay_ended(true);
    let expected = [
        delivered(1, 0),
        delivered(1, 1),
        delivered(1, 2),
        turn(Turn::Whole),
    ];
    assert_eq!(steps(&mut order), expected);
}

#[test]
fn a_replay_that_does_not_reach_back_leaves_a_gap() {
    let mut order = order(Source::Replays);
    steps(&mut order);
    let mut out = Vec::new();
    loop {
        order.replayed(frame(1, 5));
        order.replay_ended(true);
        let some = steps(&mut order);
        let asks = some.contains(&replay(0));
        out.extend(some);
        if !asks {
            break;
        }
    }
    out.retain(|step| *step != replay(0));
    assert_eq!(out, [turn(Turn::Gap { missing: 5 }), delivered(1, 5)]);
}

#[test]
fn a_gap_is_filled_and_later_frames_wait() {
    let mut order = running(Source::Replays, 1);
    order.live(frame(1, 4));
    assert_eq!(steps(&mut order), [replay(1)]);
    order.live(frame(1, 5));
    assert_eq!(order.held().0, 2);
    assert_eq!(steps(&mut order), []);
    for sequence in 1..=4 {
        order.replayed(frame(1, sequence));
    }
    order.replay_ended(true);
    let mut expected: Vec<_> = (2..=5).map(|s| delivered(1, s)).collect();
    expected.push(turn(Turn::Whole));
    assert_eq!(steps(&mut order), expected);
}

#[test]
fn a_repetition_is_passed_over_and_is_no_restart() {
    for source in [Source::Live, Source::Replays, Source::Queues] {
        let mut order = running(source, 3);
        order.live(frame(1, 0));
        order.live(frame(1, 3));
        assert_eq!(steps(&mut order), []);
    }
}

#[test]
fn another_frame_under_a_number_is_a_restart_where_nobody_can_be_asked() {
    for source in [Source::Live, Source::Queues] {
        let mut order = running(source, 3);
        order.live(frame(2, 0));
        let expected = [turn(Turn::Restarted), turn(Turn::Whole), delivered(2, 0)];
        assert_eq!(steps(&mut order), expected);
        let mut order = running(source, 3);
        order.live(frame(2, 2));
        let expected = [
            turn(Turn::Restarted),
            turn(Turn::Gap { missing: 2 }),
            delivered(2, 2),
        ];
        assert_eq!(steps(&mut order), expected);
    }
}

#[test]
fn the_replay_tells_a_restart_even_where_the_numbers_go_on() {
    let mut order = running(Source::Replays, 3);
    order.closed();
    order.opened();
    order.live(frame(2, 4));
    assert_eq!(
        steps(&mut order),
        [turn(Turn::Closed), turn(Turn::Opened), replay(3)]
    );
    order.replayed(frame(2, 3));
    assert_eq!(steps(&mut order), [turn(Turn::Restarted), replay(0)]);
    for sequence in 0..=4 {
        order.replayed(frame(2, sequence));
    }
    order.replay_ended(true);
    let mut expected: Vec<_> = (0..=4).map(|s| delivered(2, s)).collect();
    expected.push(turn(Turn::Whole));
    assert_eq!(steps(&mut order), expected);
}

#[test]
fn a_replay_without_the_last_frame_is_another_run() {
    let mut order = running(Source::Replays, 3);
    order.closed();
    order.opened();
    order.replay_ended(true);
    let out = steps(&mut order);
    assert_eq!(out[3..], [turn(Turn::Restarted), replay(0)]);
}

#[test]
fn a_late_frame_makes_a_question_and_nothing_else() {
    let mut order = Order::new(
        Source::Replays,
        Limits {
            frames: 2,
            bytes: 1000,
        },
        None,
    );
    order.opened();
    order.replay_ended(true);
    for sequence in 0..=9 {
        order.live(frame(1, sequence));
    }
    steps(&mut order);
    order.live(frame(1, 0));
    assert_eq!(steps(&mut order), [replay(9)]);
    order.replayed(frame(1, 9));
    order.replay_ended(true);
    assert_eq!(steps(&mut order), [turn(Turn::Whole)]);
}

#[test]
fn a_restored_stream_goes_on_where_it_was() {
    let resume = Resume {
        sequence: 7,
        mark: mark(&frame(1, 7).payload),
        is_whole: true,
    };
    let mut order = Order::new(Source::Replays, Limits::default(), Some(resume));
    order.opened();
    assert_eq!(steps(&mut order), [turn(Turn::Opened), replay(0)]);
    for sequence in 5..=8 {
        order.replayed(frame(1, sequence));
    }
    order.replay_ended(true);
    let mut expected: Vec<_> = (5..=7).map(|s| Step::Recall(frame(1, s))).collect();
    expected.extend([delivered(1, 8), turn(Turn::Whole)]);
    assert_eq!(steps(&mut order), expected);
    // Nobody can be asked: that nothing was missed can't be known.
    let mut order = Order::new(Source::Live, Limits::default(), Some(resume));
    order.opened();
    order.live(frame(1, 8));
    let expected = [
        turn(Turn::Opened),
        turn(Turn::Gap { missing: 0 }),
        delivered(1, 8),
    ];
    assert_eq!(steps(&mut order), expected);
}

#[test]
fn what_is_held_is_bounded_and_asked_for_again() {
    let limits = Limits {
        frames: 3,
        bytes: 1 << 20,
    };
    let mut order = Order::new(Source::Replays, limits, None);
    order.opened();
    for sequence in 1..100 {
        order.live(frame(1, sequence));
        assert!(order.held().0 <= 3);
    }
    steps(&mut order);
    for sequence in 0..=50 {
        order.replayed(frame(1, sequence));
    }
    order.replay_ended(true);
    let out = steps(&mut order);
    assert_eq!(out.last(), Some(&replay(50)));
    for sequence in 50..100 {
        order.replayed(frame(1, sequence));
    }
    order.replay_ended(true);
    assert_eq!(steps(&mut order).last(), Some(&turn(Turn::Whole)));
}

#[test]
fn without_an_answer_the_stream_goes_on_with_a_gap() {
    let mut order = running(Source::Replays, 1);
    order.live(frame(1, 4));
    for _ in 0..TRIES {
        assert_eq!(steps(&mut order), [replay(1)]);
        order.replay_ended(false);
    }
    assert_eq!(
        steps(&mut order),
        [turn(Turn::Gap { missing: 2 }), delivered(1, 4)]
    );
}

/// What happens to a stream.
#[derive(Clone, Debug)]
enum Act {
    /// The engine publishes; the frame is lost, arrives, arrives twice or arrives late.
    Publish(Fate),
    /// The connection breaks and comes back.
    Reconnect,
    /// The engine restarts and publishes this much before anyone listens.
    Restart(u64),
    /// Up to this many frames of the replay under way arrive.
    Replay(usize),
    /// The replay under way fails.
    Fail,
    /// Late frames arrive.
    Late,
    /// An earlier frame of the run arrives once more.
    Again(u64),
    /// Nothing comes for a while.
    Quiet,
    /// The sidecar restarts with what it had.
    Resume,
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Arrives,
    Lost,
    Twice,
    Late,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => Just(Act::Publish(Fate::Arrives)),
        2 => Just(Act::Publish(Fate::Lost)),
        1 => Just(Act::Publish(Fate::Twice)),
        2 => Just(Act::Publish(Fate::Late)),
        1 => Just(Act::Reconnect),
        1 => (0_u64..12).prop_map(Act::Restart),
        6 => (0_usize..9).prop_map(Act::Replay),
        1 => Just(Act::Fail),
        2 => Just(Act::Late),
        1 => (0_u64..9).prop_map(Act::Again),
        1 => Just(Act::Quiet),
        1 => Just(Act::Resume),
    ]
}

/// An engine, the way to it, and an index that takes what comes out.
struct World {
    source: Source,
    limits: Limits,
    order: Order,
    run: u64,
    published: u64,
    ring: u64,
    late: Vec<Frame>,
    answer: Option<VecDeque<Frame>>,
    content: Vec<Frame>,
    is_whole: bool,
    gaps: u64,
}

impl World {
    fn new(source: Source, ring: u64, limits: Limits) -> Self {
        let mut world = Self {
            source,
            limits,
            order: Order::new(source, limits, None),
            run: 1,
            published: 0,
            ring,
            late: Vec::new(),
            answer: None,
            content: Vec::new(),
            is_whole: true,
            gaps: 0,
        };
        world.order.opened();
        world.drain();
        world
    }

    fn drain(&mut self) {
        while let Some(step) = self.order.next_step() {
            match step {
                Step::Deliver(frame) => {
                    let next = self.content.last().map_or(0, |f| f.sequence + 1);
                    assert!(frame.sequence >= next, "numbers grow");
                    assert!(
                        frame.sequence == next || !self.is_whole,
                        "a number was passed over without a word"
                    );
                    self.content.push(frame);
                }
                Step::Recall(frame) => {
                    let last = self.content.last().map(|last| last.sequence);
                    assert!(
                        Some(frame.sequence) <= last,
                        "recalled before it was delivered"
                    );
                }
                Step::Turn(Turn::Restarted) => {
                    self.content.clear();
                    self.is_whole = true;
                }
                Step::Turn(Turn::Gap { missing }) => {
                    self.is_whole = false;
                    self.gaps += missing;
                }
                Step::Turn(Turn::Whole) => assert!(self.is_whole, "whole after a gap"),
                Step::Turn(_) => {}
                Step::Replay { from } => {
                    let first = from.max(self.published.saturating_sub(self.ring));
                    self.answer = Some(
                        (first..self.published)
                            .map(|s| frame(self.run, s))
                            .collect(),
                    );
                }
            }
            let (frames, bytes) = self.order.held();
            assert!(frames <= self.limits.frames + 1 && bytes <= self.limits.bytes + 8);
        }
    }

    fn replay(&mut self, frames: usize) {
        for _ in 0..frames {
            let Some(answer) = &mut self.answer else {
                return;
            };
            match answer.pop_front() {
                Some(frame) => self.order.replayed(frame),
                None => {
                    self.answer = None;
                    self.order.replay_ended(true);
                }
            }
            self.drain();
        }
    }

    fn fail(&mut self) {
        if self.answer.take().is_some() {
            self.order.replay_ended(false);
            self.drain();
        }
    }

    fn reconnect(&mut self) {
        // What was under way on the connection is gone with it.
        self.late.clear();
        self.answer = None;
        self.order.closed();
        self.order.opened();
        self.drain();
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Publish(fate) => {
                let frame = frame(self.run, self.published);
                self.published += 1;
                match fate {
                    Fate::Lost => {}
                    Fate::Late => self.late.push(frame),
                    Fate::Arrives => self.order.live(frame),
                    Fate::Twice => {
                        self.order.live(frame.clone());
                        self.order.live(frame);
                    }
                }
            }
            Act::Reconnect => self.reconnect(),
            Act::Restart(published) => {
                self.run += 1;
                self.published = published;
                self.reconnect();
            }
            Act::Replay(frames) => self.replay(frames),
            Act::Fail => self.fail(),
            Act::Late => {
                for frame in std::mem::take(&mut self.late).into_iter().rev() {
                    self.order.live(frame);
                }
            }
            Act::Again(back) => {
                if let Some(sequence) = self.published.checked_sub(back + 1) {
                    self.order.live(frame(self.run, sequence));
                }
            }
            Act::Quiet => self.order.quiet(),
            Act::Resume => {
                let resume = self.content.last().map(|last| Resume {
                    sequence: last.sequence,
                    mark: mark(&last.payload),
                    is_whole: self.is_whole,
                });
                self.order = Order::new(self.source, self.limits, resume);
                if resume.is_none() {
                    self.is_whole = true;
                }
                self.late.clear();
                self.answer = None;
                self.order.opened();
            }
        }
        self.drain();
    }

    /// All is quiet, then one frame comes through and replays are answered.
    fn settle(&mut self) {
        self.replay(usize::MAX);
        self.act(&Act::Publish(Fate::Arrives));
        self.replay(usize::MAX);
        self.act(&Act::Quiet);
        self.replay(usize::MAX);
        assert_eq!(self.order.held(), (0, 0));
    }

    fn truth(&self) -> Vec<Frame> {
        (0..self.published).map(|s| frame(self.run, s)).collect()
    }

    /// Exact, or told not to be; never of a run that is over without a word.
    fn check(&self) {
        let truth = self.truth();
        if self.is_whole {
            assert_eq!(self.content, truth);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    #[test]
    fn with_a_long_replay_the_content_is_exact(acts in prop::collection::vec(act(), 0..60)) {
        let mut world = World::new(Source::Replays, u64::MAX, Limits::default());
        for act in acts.iter().filter(|act| !matches!(act, Act::Fail)) {
            world.act(act);
        }
        world.settle();
        prop_assert_eq!(&world.content, &world.truth());
        prop_assert!(world.is_whole);
        prop_assert_eq!(world.gaps, 0);
    }

    #[test]
    fn with_a_short_or_failing_replay_the_content_is_exact_or_said_not_to_be(
        acts in prop::collection::vec(act(), 0..60),
        ring in 1_u64..8,
        frames in 1_usize..6,
    ) {
        let limits = Limits { frames, bytes: 8 * frames };
        let mut world = World::new(Source::Replays, ring, limits);
        for act in &acts {
            world.act(act);
        }
        world.settle();
        world.check();
        let last = frame(world.run, world.published - 1);
        prop_assert_eq!(world.content.last(), Some(&last));
    }

    #[test]
    fn without_replay_the_content_is_exact_or_said_not_to_be(
        acts in prop::collection::vec(act(), 0..60),
    ) {
        let mut world = World::new(Source::Live, 0, Limits::default());
        for act in &acts {
            world.act(act);
        }
        world.settle();
        world.check();
        let last = frame(world.run, world.published - 1);
        prop_assert_eq!(world.content.last(), Some(&last));
    }
}
