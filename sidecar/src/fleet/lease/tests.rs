use serde_json::json;

use super::*;

fn base(more: &str) -> Config {
    let text = format!(
        "registration: {{networks: [10.0.0.0/8, 'fd00::/8'], max_workers: 3}}\n{more}\n\
         workers: [{{id: 1, endpoint: '10.0.0.1:80'}}]"
    );
    Config::parse(&text, &[]).unwrap_or_else(|e| panic!("{e}"))
}

fn said(id: u64, more: &Value) -> Said {
    let mut text = json!({"id": id, "endpoint": format!("10.0.0.{id}:80"), "ttl_secs": 5});
    let text = text.as_object_mut().unwrap();
    text.extend(more.as_object().unwrap().clone());
    Said::of(text.clone()).unwrap()
}

fn ids(config: &Config) -> Vec<u64> {
    config.pools[0].workers.iter().map(|w| w.id).collect()
}

#[test]
fn a_lease_lasts_until_it_is_renewed_no_more() {
    let (base, mut leases) = (base(""), Leases::default());
    let joined = leases.join(&base, said(2, &json!({})), 0).unwrap();
    assert_eq!(joined.outcome, Outcome::Joined);
    assert_eq!(ids(&leases.over(base.clone())), [1, 2]);
    let again = leases.join(&base, said(2, &json!({})), 4_000).unwrap();
    assert_eq!(again.outcome, Outcome::Renewed);
    assert!(leases.expire(8_999).is_empty());
    assert_eq!(leases.renew(2, 8_999).unwrap().ttl_secs, 5.0);
    assert_eq!(leases.next_expiry(), Some(13_999));
    assert_eq!(leases.expire(13_999), [2]);
    assert_eq!(
        leases.renew(2, 14_000),
        Err(RegisterError::NotRegistered(2))
    );
    assert_eq!(ids(&leases.over(base)), [1]);
}

#[test]
fn what_a_worker_says_anew_is_a_change_and_who_leaves_is_gone() {
    let (base, mut leases) = (base(""), Leases::default());
    leases.join(&base, said(2, &json!({})), 0).unwrap();
    let drained = leases.join(&base, said(2, &json!({"draining": true})), 0);
    assert_eq!(drained.unwrap().outcome, Outcome::Changed);
    assert!(leases.list(1_000)[0].draining);
    assert_eq!(leases.list(1_000)[0].left_secs, 4.0);
    assert_eq!(leases.leave(&base, 2), Ok(()));
    assert_eq!(leases.leave(&base, 2), Err(RegisterError::NotRegistered(2)));
    assert_eq!(leases.leave(&base, 1), Err(RegisterError::OfFile(1)));
}

#[test]
fn registrants_are_held_to_networks_pool_and_number() {
    let (base, mut leases) = (
        base("kv_cache_block_size: 16\nmodels: [llama]"),
        Leases::default(),
    );
    let mut kind = |said: Said| leases.join(&base, said, 0).map_err(|e| e.kind());
    let refused = [
        (json!({"endpoint": "192.168.0.1:80"}), "network"),
        (
            json!({"events": {"zmq": {"endpoint": "tcp://10.9.9.9:1"}}}),
            "",
        ),
        (
            json!({"events": {"zmq": {"endpoint": "tcp://[fd00::1]:1"}}}),
            "",
        ),
        (
            json!({"events": {"zmq": {"endpoint": "tcp://elsewhere:1"}}}),
            "network",
        ),
        (
            json!({"events": {"trtllm": {"url": "http://1.2.3.4/kv_cache_events"}}}),
            "network",
        ),
        (
            json!({"events": {"http": {"trust_loopback": true}}}),
            "events",
        ),
        (json!({"pool": "other"}), "no_such_pool"),
        (json!({"model": "gpt"}), "no_such_pool"),
        (json!({"model": "llama", "block_size": 32}), "block_size"),
        (json!({"ttl_secs": 0.5}), "ttl"),
        (json!({"id": 1}), "of_file"),
        (json!({"endpoint": "10.0.0.1:80"}), "endpoint_taken"),
        (json!({"data_parallel_size": 1024}), "full"),
        (json!({"model": "llama", "block_size": 16}), ""),
    ];
    for (more, expected) in refused {
        let outcome = kind(said(7, &more)).err().unwrap_or_default();
        assert_eq!(outcome, expected, "{more}");
    }
    for id in [8, 9] {
        kind(said(id, &json!({}))).unwrap();
    }
    assert_eq!(kind(said(10, &json!({}))).err(), Some("full"));
    let off = Config::parse("workers: []", &[]).unwrap();
    assert_eq!(
        Leases::default().join(&off, said(7, &json!({})), 0),
        Err(RegisterError::Off)
    );
}

#[test]
fn bodies_that_no_worker_says_are_refused_with_the_key() {
    for (body, key) in [
        ("[]", "invalid type"),
        (r#"{"id": 7}"#, "endpoint: missing"),
        (r#"{"endpoint": "10.0.0.7:80"}"#, "id: missing"),
        (
            r#"{"id": 7, "endpoint": "host:80"}"#,
            "endpoint: must be ip:port",
        ),
        (
            r#"{"id": 7, "endpoint": "10.0.0.7:80", "colour": 1}"#,
            "colour: unknown key",
        ),
        (
            r#"{"id": 7, "endpoint": "10.0.0.7:80", "ttl_secs": "x"}"#,
            "invalid type",
        ),
    ] {
        let error = Said::read(body.as_bytes()).unwrap_err();
        assert!(error.to_string().contains(key), "{body}: {error}");
    }
}

#[test]
fn the_saved_are_there_for_one_lease_more() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = Some(folder.path().join("workers.json"));
    let base = base("");
    let mut leases = Leases::restore(file.clone(), &base, 0);
    leases
        .join(&base, said(2, &json!({"taints": ["spot"]})), 0)
        .unwrap();
    leases.join(&base, said(3, &json!({})), 0).unwrap();
    leases.save();
    let restored = Leases::restore(file.clone(), &base, 1_000_000);
    assert_eq!(restored.next_expiry(), Some(1_005_000));
    let config = restored.over(base.clone());
    assert_eq!(ids(&config), [1, 2, 3]);
    assert_eq!(config.pools[0].workers[1].metadata.taints, ["spot"]);
    std::fs::write(folder.path().join("workers.json"), "{").unwrap();
    assert!(Leases::restore(file, &base, 0).is_empty());
}
