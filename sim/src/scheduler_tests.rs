use kv_core::hash::Seed;

use super::*;

const BLOCK: usize = 4;
const STEP: Duration = Duration::from_millis(6);
const TOKEN: Duration = Duration::from_micros(80);
const DECODE: Duration = Duration::from_micros(100);

fn scheduler(blocks: usize) -> Scheduler {
    let limits = Limits {
        block_size: BLOCK,
        max_batched_tokens: 32,
        max_seqs: 4,
        step: STEP,
        prefill_per_token: TOKEN,
        decode_per_seq: DECODE,
    };
    Scheduler::new(limits, blocks)
}

fn submit(
    scheduler: &mut Scheduler,
    prompt: Vec<u32>,
    max_tokens: usize,
) -> mpsc::Receiver<Output> {
    let (out, tokens) = mpsc::channel(max_tokens);
    let chain = Chain::new(1, BLOCK, Seed::new("", ""));
    scheduler.submit(Sequence::new(
        prompt,
        max_tokens,
        chain,
        Duration::ZERO,
        out,
    ));
    tokens
}

fn step(scheduler: &mut Scheduler) -> Option<Duration> {
    let duration = scheduler.begin_step()?;
    scheduler.end_step(duration);
    Some(duration)
}

fn run_dry(scheduler: &mut Scheduler) -> usize {
    let mut steps = 0;
    while step(scheduler).is_some() {
        steps += 1;
        assert!(steps < 10_000, "no end");
    }
    steps
}

fn received(tokens: &mut mpsc::Receiver<Output>) -> Vec<Output> {
    std::iter::from_fn(|| tokens.try_recv().ok()).collect()
}

fn prompt(first: u32, length: u32) -> Vec<u32> {
    (first..first + length).collect()
}

#[test]
fn a_request_gets_its_answer_and_leaves_its_full_blocks() {
    let mut scheduler = scheduler(8);
    let mut tokens = submit(&mut scheduler, prompt(0, 6), 4);
    assert_eq!(run_dry(&mut scheduler), 4);
    let got = received(&mut tokens);
    let answer = Answer::to(&prompt(0, 6));
    let expected: Vec<u32> = (0..4).map(|position| answer.token(position)).collect();
    assert_eq!(got.iter().map(|o| o.token).collect::<Vec<_>>(), expected);
    assert!(got[3].last && !got[2].last);
    // Six prompt and three output tokens are computed; the fourth output token never is.
    assert_eq!(scheduler.cache().keys().count(), 2);
    assert_eq!(scheduler.cache().pinned(), 0);
}

#[test]
fn a_cached_prompt_still_computes_its_last_block() {
    let mut scheduler = scheduler(8);
    let _first = submit(&mut scheduler, prompt(0, 8), 1);
    run_dry(&mut scheduler);
    let mut tokens = submit(&mut scheduler, prompt(0, 8), 1);
    assert_eq!(step(&mut scheduler), Some(STEP + TOKEN * 4));
    assert_eq!(received(&mut tokens)[0].cached_tokens, 4);
    let counters = scheduler.counters();
    assert_eq!((counters.prefix_queries, counters.prefix_hits), (16, 4));
}

#[test]
fn the_next_turn_hits_the_answer_of_the_turn_before() {
    let mut scheduler = scheduler(16);
    let mut tokens = submit(&mut scheduler, prompt(0, 6), 7);
    run_dry(&mut scheduler);
    let mut history = prompt(0, 6);
    history.extend(received(&mut tokens).iter().map(|output| output.token));
    history.extend(prompt(900, 5));
    let mut next = submit(&mut scheduler, history, 1);
    run_dry(&mut scheduler);
    assert_eq!(received(&mut next)[0].cached_tokens, 12);
}

#[test]
fn long_prefills_are_chunked_and_share_steps_with_decodes() {
    let mut scheduler = scheduler(64);
    let _short = submit(&mut scheduler, prompt(0, 2), 10);
    assert_eq!(step(&mut scheduler), Some(STEP + TOKEN * 2));
    let mut long = submit(&mut scheduler, prompt(100, 70), 2);
    // The decode takes one token of the budget of 32.
    assert_eq!(step(&mut scheduler), Some(STEP + TOKEN * 31 + DECODE));
    assert_eq!(step(&mut scheduler), Some(STEP + TOKEN * 31 + DECODE));
    assert!(long.try_recv().is_err());
    assert_eq!(step(&mut scheduler), Some(STEP + TOKEN * 8 + DECODE));
    assert!(long.try_recv().is_ok());
    assert_eq!(step(&mut scheduler), Some(STEP + DECODE * 2));
}

#[test]
fn requests_wait_while_there_is_no_room_and_are_served_in_order() {
    let mut scheduler = scheduler(4);
    let _first = submit(&mut scheduler, prompt(0, 11), 1);
    let mut second = submit(&mut scheduler, prompt(50, 8), 1);
    let mut third = submit(&mut scheduler, prompt(80, 1), 1);
    step(&mut scheduler);
    assert_eq!(scheduler.waiting(), 2);
    assert!(third.try_recv().is_err(), "nobody overtakes");
    run_dry(&mut scheduler);
    assert!(second.try_recv().is_ok() && third.try_recv().is_ok());
}

#[test]
fn no_more_sequences_run_than_allowed() {
    let mut scheduler = scheduler(64);
    let clients: Vec<_> = (0..6)
        .map(|at| submit(&mut scheduler, prompt(at * 10, 2), 2))
        .collect();
    step(&mut scheduler);
    assert_eq!((scheduler.running(), scheduler.waiting()), (4, 2));
    run_dry(&mut scheduler);
    assert_eq!(scheduler.counters().requests_finished, clients.len() as u64);
}

#[test]
fn the_newest_is_preempted_and_still_answers_in_full() {
    let mut scheduler = scheduler(6);
    let mut old = submit(&mut scheduler, prompt(0, 8), 12);
    let mut young = submit(&mut scheduler, prompt(50, 8), 12);
    run_dry(&mut scheduler);
    assert!(scheduler.counters().preemptions > 0);
    for (first, client) in [(0, &mut old), (50, &mut young)] {
        let answer = Answer::to(&prompt(first, 8));
        let got: Vec<u32> = received(client).iter().map(|o| o.token).collect();
        let expected: Vec<u32> = (0..12).map(|position| answer.token(position)).collect();
        assert_eq!(got, expected);
    }
    let counters = scheduler.counters();
    assert_eq!((counters.prompt_tokens, counters.prefix_queries), (16, 16));
}

#[test]
fn an_abandoned_request_frees_its_place() {
    let mut scheduler = scheduler(4);
    let gone = submit(&mut scheduler, prompt(0, 8), 8);
    let waiting_gone = submit(&mut scheduler, prompt(20, 8), 8);
    let mut kept = submit(&mut scheduler, prompt(40, 12), 1);
    step(&mut scheduler);
    drop((gone, waiting_gone));
    run_dry(&mut scheduler);
    assert!(kept.try_recv().is_ok());
    assert_eq!(scheduler.counters().requests_aborted, 2);
    assert_eq!(scheduler.cache().pinned(), 0);
}

#[test]
fn aborting_all_ends_every_stream_and_frees_every_block() {
    let mut scheduler = scheduler(8);
    let mut running = submit(&mut scheduler, prompt(0, 8), 8);
    step(&mut scheduler);
    let mut waiting = submit(&mut scheduler, prompt(20, 8), 8);
    scheduler.abort_all();
    assert!(running.try_recv().is_ok_and(|output| !output.last));
    let disconnected = Err(mpsc::error::TryRecvError::Disconnected);
    assert_eq!(running.try_recv(), disconnected);
    assert_eq!(waiting.try_recv(), disconnected);
    assert_eq!(scheduler.cache().pinned(), 0);
}
