//! What changes while requests run: the worker list, the sidecar, NATS, the leader of the bridge.

use std::collections::BTreeSet;

use kv_core::event::StorageTier;
use kv_core::hash::Seed;
use kv_tests::events::{Encoding, Publisher, stored};
use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::{self, Upstream};
use kv_tests::wait;
use serde_json::{Value, json};

fn prompt(conversation: u32) -> Vec<u32> {
    (0..320).map(|i| conversation * 1000 + i).collect()
}

async fn start(threads: u32, upstreams: &[Upstream]) -> (Stack, Publisher) {
    let workers = upstream::workers(upstreams);
    let stack = Stack::start(&Setup {
        threads,
        workers,
        more: json!({}),
    })
    .await;
    let publisher = Publisher::connect(&stack.nats.url()).await;
    (stack, publisher)
}

async fn chosen(stack: &Stack, tokens: &[u32]) -> (u64, Value) {
    let (answer, decision) = stack.complete(tokens).await.expect("an answer");
    (answer["worker"].as_u64().expect("a worker"), decision)
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_join_and_leave_and_a_returning_one_is_asked_what_it_holds() {
    let upstreams = Upstream::start_all(3).await;
    let (mut stack, mut publisher) = start(1, &upstreams).await;
    for worker in 1..=3 {
        let data = stored(&prompt(worker), 16, Seed::default());
        publisher
            .publish(
                u64::from(worker),
                StorageTier::Device,
                data,
                Encoding::Dynamo,
            )
            .await;
    }
    stack.sidecar.settled(3).await;
    assert_eq!(chosen(&stack, &prompt(2)).await.0, 2);

    let all = stack.config["workers"].clone();
    let version = stack.table_version().await;
    stack.configure(|config| {
        let workers = config["workers"].as_array_mut().expect("a list");
        workers.remove(1);
    });
    let version = stack.table_after(version).await;
    for _ in 0..20 {
        let (worker, decision) = chosen(&stack, &prompt(2)).await;
        assert_ne!(worker, 2, "{decision}");
        assert_eq!(decision["candidates"].as_array().map(Vec::len), Some(2));
    }
    assert_eq!(chosen(&stack, &prompt(3)).await.0, 3);

    // While it was away it stored another prompt, which its snapshot tells.
    publisher
        .publish(
            2,
            StorageTier::Device,
            stored(&prompt(8), 16, Seed::default()),
            Encoding::Dynamo,
        )
        .await;
    stack.configure(|config| config["workers"] = all);
    stack.table_after(version).await;
    for conversation in [2, 8] {
        let back = async || {
            let (worker, decision) = chosen(&stack, &prompt(conversation)).await;
            let overlap = decision["candidates"][0]["overlap"][0].as_u64();
            if (worker, overlap) == (2, Some(20)) {
                Ok(())
            } else {
                Err(decision)
            }
        };
        wait::until("the worker's snapshot", back).await;
    }
    let workers = async || {
        let mut seen = BTreeSet::new();
        for i in 0..20 {
            seen.insert(chosen(&stack, &prompt(100 + i)).await.0);
        }
        if seen.len() == 3 { Ok(()) } else { Err(seen) }
    };
    wait::until("traffic on all workers", workers).await;
    stack.envoy.idle().await;
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_configuration_is_refused_and_the_old_one_stays() {
    let upstreams = Upstream::start_all(2).await;
    let (mut stack, _publisher) = start(1, &upstreams).await;
    stack.configure(|config| config["router_temperature"] = json!(-1));
    let refused = async || {
        let log = stack.sidecar.process.output();
        if log.contains("router_temperature") {
            Ok(())
        } else {
            Err(log)
        }
    };
    wait::until("the refusal", refused).await;
    assert_eq!(chosen(&stack, &prompt(1)).await.1["reason"], "kv");
    let version = stack.table_version().await;
    stack.configure(|config| config["router_temperature"] = json!(0.5));
    stack.table_after(version).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sidecar_costs_no_request_and_comes_back_with_its_index() {
    let upstreams = Upstream::start_all(3).await;
    let (mut stack, mut publisher) = start(2, &upstreams).await;
    for worker in 1..=3 {
        let data = stored(&prompt(worker), 16, Seed::default());
        publisher
            .publish(u64::from(worker), StorageTier::Device, data, Encoding::Json)
            .await;
    }
    stack.sidecar.settled(3).await;
    stack.sidecar.process.kill();
    // Envoy goes on with the pages it has.
    for round in 0..30 {
        let worker = 1 + round % 3;
        let (chosen, decision) = chosen(&stack, &prompt(worker)).await;
        assert_eq!(chosen, u64::from(worker), "{decision}");
    }
    // One more event while nobody listens; the engine's snapshot has it.
    let data = stored(&prompt(7), 16, Seed::default());
    publisher
        .publish(2, StorageTier::Device, data, Encoding::Json)
        .await;
    stack.sidecar.restart();
    stack.sidecar.ready().await;
    let back = async || {
        let (worker, decision) = chosen(&stack, &prompt(7)).await;
        let overlap = decision["candidates"][0]["overlap"][0].as_u64();
        if (worker, overlap) == (2, Some(20)) {
            Ok(())
        } else {
            Err(decision)
        }
    };
    wait::until("the missed event", back).await;
    for worker in 1..=3 {
        assert_eq!(chosen(&stack, &prompt(worker)).await.0, u64::from(worker));
    }
    stack.envoy.idle().await;
    stack.envoy.intended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_may_restart() {
    let upstreams = Upstream::start_all(2).await;
    let (mut stack, mut publisher) = start(1, &upstreams).await;
    publisher
        .publish(
            1,
            StorageTier::Device,
            stored(&prompt(1), 16, Seed::default()),
            Encoding::Json,
        )
        .await;
    stack.sidecar.settled(1).await;
    stack.nats.restart().await;
    let mut publisher_again = Publisher::connect(&stack.nats.url()).await;
    publisher_again.adopt(&publisher);
    drop(publisher);
    stack.sidecar.ready().await;
    publisher_again
        .publish(
            2,
            StorageTier::Device,
            stored(&prompt(2), 16, Seed::default()),
            Encoding::Json,
        )
        .await;
    let seen = async || {
        let (worker, decision) = chosen(&stack, &prompt(2)).await;
        let overlap = decision["candidates"][0]["overlap"][0].as_u64();
        if (worker, overlap) == (2, Some(20)) {
            Ok(())
        } else {
            Err(decision)
        }
    };
    wait::until("an event after the restart", seen).await;
    assert_eq!(chosen(&stack, &prompt(1)).await.0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_stop_iteration_flag_requests_are_let_go() {
    let upstreams = Upstream::start_all(2).await;
    let (mut stack, _publisher) = start(1, &upstreams).await;
    let flag = "allow_on_headers_stop_iteration: ";
    let forget = |filter: String| {
        assert!(filter.contains(&format!("{flag}true")));
        filter.replace(&format!("{flag}true"), &format!("{flag}false"))
    };
    stack.envoy = stack.another_envoy("second", 1, forget).await;

    for _ in 0..3 {
        let (_, decision) = chosen(&stack, &prompt(1)).await;
        assert_eq!(decision["reason"], "unheld", "{decision}");
    }
    let log = stack.envoy.process.output();
    assert!(
        log.contains("allow_on_headers_stop_iteration"),
        "the log names the flag"
    );
    stack.envoy.idle().await;
}
