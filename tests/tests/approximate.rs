//! Blocks predicted from the requests routed: by the room of their worker, and beside events.

use kv_tests::stack::{Setup, Stack};
use kv_tests::upstream::Upstream;
use kv_tests::wait;
use serde_json::{Value, json};

const BLOCK: usize = 16;

async fn start(workers: Value, more: Value) -> Stack {
    let mut more = more;
    more["workers"] = workers;
    Stack::start(&Setup {
        threads: 2,
        workers: Vec::new(),
        more,
    })
    .await
}

/// Tokens of a prompt that shares no block with another one.
fn prompt(number: usize, blocks: usize) -> Vec<u32> {
    let token = |i: usize| u32::try_from(1 + (number * 7_919 + i) % 150_000).expect("a token id");
    (0..blocks * BLOCK).map(token).collect()
}

/// Waits until a worker is taken to hold so many blocks of a prompt, in the sidecar and in Envoy.
async fn held(stack: &Stack, worker: u64, tokens: &[u32], blocks: u64) {
    let settled = async || {
        let body = json!({"tokens": tokens});
        let explained = stack
            .client
            .post(stack.sidecar.admin, "/v1/explain", &body)
            .await?;
        let mut owners = explained["owners"].as_array().into_iter().flatten();
        let owner = owners.find(|owner| owner["worker"] == worker);
        let found = owner.map(|owner| owner["overlap"][0].clone());
        let index = stack.sidecar.index().await?;
        if found == Some(json!(blocks)) && index["settled"] == true {
            Ok(())
        } else {
            Err(explained.to_string())
        }
    };
    wait::until("the predicted blocks", settled).await;
}

/// What the decision record says a worker holds.
fn overlap(decision: &Value, worker: u64) -> Option<u64> {
    let mut candidates = decision["candidates"].as_array().into_iter().flatten();
    let found = candidates.find(|candidate| candidate["worker"] == worker)?;
    found["overlap"][0].as_u64()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_forgets_what_it_has_no_room_for_and_no_sooner() {
    let upstream = Upstream::start(1).await;
    let workers = json!([{"id": 1, "endpoint": upstream.address, "total_kv_blocks": 24}]);
    let more = json!({
        "kv_events": false, "nats": null, "router_ttl_secs": 0.1,
        "router_approximate_cache_policy": "lru",
    });
    let stack = start(workers, more).await;
    let (first, second, third) = (prompt(1, 10), prompt(2, 10), prompt(3, 10));
    for tokens in [&first, &second] {
        stack.complete(tokens).await.expect("an answer");
        held(&stack, 1, tokens, 10).await;
    }
    // Long after its time to live the first one is there, and used again.
    let (_, decision) = stack.complete(&first).await.expect("an answer");
    assert_eq!(overlap(&decision, 1), Some(10), "{decision}");
    // The third needs six blocks more than there is room for: the longest unused ones go, the
    // last of the second prompt first.
    stack.complete(&third).await.expect("an answer");
    held(&stack, 1, &third, 10).await;
    held(&stack, 1, &second, 4).await;
    held(&stack, 1, &first, 10).await;
    let (_, decision) = stack.complete(&second).await.expect("an answer");
    assert_eq!(overlap(&decision, 1), Some(4), "{decision}");
    stack.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_routed_counts_beside_events_until_they_say_more() {
    let upstreams = [Upstream::start(1).await, Upstream::start(2).await];
    let [one, two] = upstreams.each_ref().map(|upstream| upstream.address);
    let workers = json!([{"id": 1, "endpoint": one}, {"id": 2, "endpoint": two}]);
    let mut stack = start(workers, json!({"router_predicted_ttl_secs": 300.0})).await;
    let tokens = prompt(1, 12);
    let (answer, _) = stack.complete(&tokens).await.expect("an answer");
    let home = answer["worker"].as_u64().expect("a worker");
    held(&stack, home, &tokens, 12).await;
    let (_, decision) = stack.complete(&tokens).await.expect("an answer");
    assert_eq!(overlap(&decision, home), Some(12), "{decision}");
    assert_eq!(decision["worker"], home, "{decision}");
    assert_eq!(overlap(&decision, 3 - home), Some(0), "{decision}");

    // Without the setting nothing predicted is believed in.
    let version = stack.table_version().await;
    stack.configure(|config| {
        config
            .as_object_mut()
            .expect("a map")
            .remove("router_predicted_ttl_secs");
    });
    stack.table_after(version).await;
    held(&stack, home, &tokens, 0).await;
    stack.idle().await;
}
