//! Blocks that answers fill, prefill of answers that come whole, and load that is not tracked.

use super::reports::{Sidecar, run};
use super::*;
use kv_core::report::Step;
use kv_core::tracker::Tracking;

fn site(tracking: Tracking, prefill_rate: u32) -> Site {
    let mut site = Site::new();
    let mut table = table(1, Mode::Kv);
    table.pools[0].policy.tracking = tracking;
    table.pools[0].owners[0].traits.prefill_rate = prefill_rate;
    site.publish(&table, &[]);
    site.tick();
    site
}

fn steps(site: &mut Site) -> Vec<Step> {
    run(site, 100);
    let mut sidecar = Sidecar::default();
    sidecar.read(&[site]);
    sidecar.assert_exact(site);
    sidecar.steps()
}

const OUTPUT: Tracking = Tracking {
    prefill_tokens: true,
    active_blocks: true,
    kv_reuse: true,
    output_blocks: true,
};

#[test]
fn a_streamed_answer_fills_blocks_that_go_with_the_request() {
    let mut site = site(OUTPUT, 0);
    let body = br#"{"prompt":[1,2,3,4,5,6],"stream":true,"nvext":{"agent_hints":{"osl":8}}}"#;
    let context = site.complete(body);
    assert_eq!(site.load(10).blocks, 1);
    for _ in 0..4 {
        site.host.enter(context);
        let size = site.host.answer(b"data: {\"x\":1}\n\n");
        site.vm.on_response_body(context, size, false);
    }
    // Six tokens begin two blocks, the ninth the third.
    assert_eq!(site.load(10).blocks, 2);
    let steps = steps(&mut site);
    let grown = steps.iter().find_map(|step| match step {
        Step::Grown { blocks, left, .. } => Some((*blocks, *left)),
        _ => None,
    });
    assert_eq!(grown, Some((1, 0.625)));
    site.over(context);
    site.assert_idle();
}

#[test]
fn answers_are_not_read_where_their_blocks_are_not_tracked() {
    let mut site = site(Tracking::default(), 0);
    let context = site.complete(br#"{"prompt":[1,2,3,4],"stream":true}"#);
    let size = site.host.answer(&b"data: {}\n\n".repeat(50));
    site.vm.on_response_body(context, size, false);
    assert_eq!(site.load(10).blocks, 1);
    site.over(context);
}

#[test]
fn prefill_of_an_answer_that_comes_whole_ends_by_the_workers_rate() {
    let mut site = site(Tracking::default(), 100);
    let whole = site.complete(&body(&prompt(1, 40)));
    let streamed = site.complete(br#"{"prompt":[1,2,3,4,5,6,7,8],"stream":true}"#);
    // 40 tokens take 400 ms.
    run(&mut site, 300);
    assert_eq!(site.load(10).waiting, 2);
    run(&mut site, 150);
    assert_eq!((site.load(10).waiting, site.load(10).decoding), (1, 1));
    assert_eq!(site.load(10).prefill_tokens, 8);
    assert_eq!(site.host.named("kv_router_prefills_estimated_total"), 1);
    site.vm.on_response_body(whole, 10, false);
    site.vm.on_response_body(streamed, 10, false);
    let steps = steps(&mut site);
    let count = |wanted: fn(&Step) -> bool| steps.iter().filter(|s| wanted(s)).count();
    assert_eq!(count(|s| matches!(s, Step::Prefilled { .. })), 1);
    assert_eq!(count(|s| matches!(s, Step::FirstToken { .. })), 1);
    site.over(whole);
    site.over(streamed);
    site.assert_idle();
}

#[test]
fn what_is_not_tracked_is_not_booked() {
    let tracking = Tracking {
        prefill_tokens: false,
        active_blocks: false,
        ..Tracking::default()
    };
    let mut site = site(tracking, 0);
    let context = site.complete(&body(&prompt(1, 40)));
    let load = site.load(10);
    assert_eq!((load.prefill_tokens, load.blocks, load.waiting), (0, 0, 1));
    site.over(context);
    site.assert_idle();
}
