//! Prompts that requests of several VMs share.

use super::*;

/// Two VMs of a process whose only owners are `owners`.
fn vms(owners: u16) -> [Site; 2] {
    let mut one = Site::new();
    one.publish(&table(owners, Mode::Kv), &[]);
    let mut two = one.beside();
    one.tick();
    two.tick();
    [one, two]
}

#[test]
fn a_block_that_requests_of_two_vms_use_counts_once() {
    let [mut one, mut two] = vms(1);
    let tokens = prompt(1, 40);
    let first = one.complete(&body(&tokens));
    let second = two.complete(&body(&[&tokens[..24], &prompt(2, 16)].concat()));
    assert_eq!(one.load(10).blocks, 14);
    two.vm.on_response_headers(second);
    let record = two.host.text(Headers::Response, crate::request::DECISION);
    let record: serde_json::Value = serde_json::from_str(&record.unwrap()).unwrap();
    let seen = &record["candidates"][0];
    assert_eq!(
        (&seen["active_blocks"], &seen["shared_blocks"]),
        (&10.into(), &6.into())
    );
    one.over(first);
    assert_eq!(two.load(10).blocks, 10, "the second one's");
    let third = one.complete(&body(&tokens));
    two.over(second);
    assert_eq!(one.load(10).blocks, 10, "the third one's");
    one.over(third);
    one.assert_idle();
}

#[test]
fn what_is_shared_follows_a_request_that_went_elsewhere() {
    let [mut one, mut two] = vms(2);
    let tokens = prompt(1, 40);
    let first = one.complete(&body(&tokens));
    one.host.reach(&endpoint(0), 1);
    one.vm.on_response_headers(first);
    let second = two.complete(&body(&tokens));
    two.host.reach(&endpoint(0), 1);
    two.vm.on_response_headers(second);
    assert_eq!((one.load(10).blocks, one.load(11).blocks), (10, 0));
    one.over(first);
    assert_eq!(one.load(10).blocks, 10);
    two.over(second);
    one.assert_idle();
}

#[test]
fn prompts_of_a_vm_that_is_no_more_are_forgotten() {
    let [mut one, mut two] = vms(1);
    let tokens = prompt(1, 40);
    // Its VM traps: nothing is taken back.
    two.complete(&body(&tokens));
    let mine = one.complete(&body(&tokens));
    assert_eq!(one.load(10).blocks, 10);
    for _ in 0..12 * 20 {
        one.tick();
    }
    let other = one.complete(&body(&[&tokens[..4], &prompt(2, 4)].concat()));
    // The lanes keep what the dead one booked; nobody shares it any more.
    assert_eq!(one.load(10).blocks, 10 + 10 + 1);
    one.over(mine);
    one.over(other);
    let left = one.load(10);
    assert_eq!((left.blocks, left.waiting), (10, 1));
}

#[test]
fn prompts_of_a_vm_that_is_no_more_are_forgotten_though_no_other_asks_for_them() {
    let [mut one, mut two] = vms(1);
    let tokens = prompt(1, 40);
    two.complete(&body(&tokens));
    two.complete(&body(&tokens));
    assert_eq!(one.lanes(10).b, (20 << 32) + 10);
    for _ in 0..12 * 20 {
        one.tick();
    }
    assert_eq!(one.lanes(10).b, 20 << 32);
}

#[test]
fn a_booking_that_finds_no_room_counts_in_full_and_leaves_nothing() {
    let [mut one, _] = vms(1);
    let tokens = prompt(1, 100);
    let taken: Vec<u32> = (0..900).map(|_| one.complete(&body(&tokens))).collect();
    let unlisted = one.host.named("kv_router_bookings_unlisted_total");
    assert!(unlisted > 0 && unlisted < 900);
    let blocks = u64::from(one.load(10).blocks);
    assert_eq!(blocks, 25 * (1 + unlisted));
    for context in taken {
        one.over(context);
    }
    one.assert_idle();
}
