//! The configuration file: what is refused, how layers lie over it, what the schema says.

use clap::{Args as _, FromArgMatches as _};
use kv_core::id::{Family, Role, Tier};
use kv_core::policy::{Mode, Policy, Scoring};
use kv_router::config::{Config, Events, Flags, Layer, from_environment, schema};

fn flags(arguments: &[&str]) -> Vec<Layer> {
    let command = Flags::augment_args(clap::Command::new("kv-router"));
    let arguments = std::iter::once(&"kv-router").chain(arguments);
    let matches = command.get_matches_from(arguments);
    Flags::from_arg_matches(&matches).unwrap().layers
}

fn variables(set: &[(&str, &str)]) -> Vec<Layer> {
    from_environment(set.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())))
}

fn refused(text: &str, layers: &[Layer]) -> Vec<String> {
    let errors = Config::parse(text, layers).unwrap_err();
    let mut lines: Vec<String> = errors.to_string().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn everything_wrong_is_reported_at_once_with_path_and_value() {
    let text = r#"
http_port: 99999
admin: foo
router_mode: fastest
colour: blue
nats: {url: "", json_subject: a.b}
workers:
  - {id: 1, endpoint: "1.2.3.4:80"}
  - {endpoint: "1.2.3.4:80"}
  - {id: 1, endpoint: "host:80", role: boss}
  - {id: 2, endpoint: "1.2.3.4:81", data_parallel_size: 0, tier: 3}
"#;
    let mut layers = variables(&[("DYN_ROUTER_TEMPERATURE", "-1")]);
    layers.extend(flags(&["--kv-cache-block-size", "many"]));
    assert_eq!(
        refused(text, &layers),
        [
            r#"admin: must be ip:port, got "foo""#,
            r#"colour: unknown key, value "blue""#,
            "http_port: must be at most 65535, got 99999",
            r#"kv_cache_block_size: must be of type "integer", got "many" (from --kv-cache-block-size)"#,
            "nats.json_subject: must hold {worker_id} once, as a token of its own, got a.b",
            r#"nats.url: must keep to minLength 1, got """#,
            "router_mode: must be one of kv, round-robin, random, least-loaded, power-of-two, direct, \
             device-aware-weighted, got \"fastest\"",
            "router_temperature: must be at least 0.0, got -1.0 (from DYN_ROUTER_TEMPERATURE)",
            "workers[1].endpoint: is taken by workers[0].endpoint, got 1.2.3.4:80",
            "workers[1].id: missing",
            "workers[2].endpoint: must be ip:port or [v6]:port, got \"host:80\"",
            "workers[2].id: is taken by workers[0].id, got 1",
            r#"workers[2].role: must be one of aggregated, prefill, decode, store, got "boss""#,
            "workers[3].data_parallel_size: must be at least 1, got 0",
            "workers[3].tier: unknown key, value 3",
        ]
    );
}

#[test]
fn everyone_but_a_store_has_an_endpoint() {
    let text = r#"
workers:
  - {id: 1}
  - {id: 2, role: store, endpoint: "1.2.3.4:80"}
  - {id: 3, role: store}
  - {id: 4, endpoint: 5}
  - {id: 5, endpoint: "1.2.3.4:81"}
"#;
    assert_eq!(
        refused(text, &[]),
        [
            "workers[0].endpoint: missing",
            "workers[1].endpoint: must be left out: a store takes no requests, got 1.2.3.4:80",
            r#"workers[3].endpoint: must be of type "string", got 5"#,
        ]
    );
}

#[test]
fn families_are_described_once_each() {
    let text = r#"
kv_cache_block_size: 16
shared_cache_multiplier: 0.3
families:
  - {family: flex-kv, media: [CPU, SSD], max_blocks: 4096}
  - {family: vllm-sha256-cbor, media: [FS], block_size: 256, hash_seed: "42"}
workers: [{id: 1, endpoint: "1.2.3.4:80"}, {id: 9, role: store}]
"#;
    let config = Config::parse(text, &[]).unwrap();
    let pool = &config.pools[0];
    let used: Vec<_> = pool
        .families
        .iter()
        .map(|f| (f.family, f.block_size, &*f.hash_seed, f.max_blocks))
        .collect();
    let expected = [
        (Family::FlexKv, 16, "0", Some(4096)),
        (Family::VllmSha256Cbor, 256, "42", None),
    ];
    assert_eq!(used, expected);
    assert_eq!(pool.policy.shared_cache_multiplier, 0.3);
    assert_eq!(pool.workers[1].role, Role::Store);
    let twice = text.replace("vllm-sha256-cbor", "flex-kv");
    assert_eq!(
        refused(&twice, &[]),
        ["families[1].family: is described by families[0], got flex-kv"]
    );
}

#[test]
fn pools_have_unique_names_models_and_workers() {
    let text = r#"
router_mode: kv
pools:
  - {name: a, models: [m], workers: [{id: 1, endpoint: "1.1.1.1:1"}]}
  - {name: a, models: [m], workers: [{id: 1, endpoint: "1.1.1.1:1"}]}
  - {name: "b c"}
"#;
    assert_eq!(
        refused(text, &[]),
        [
            r#"pools[1].models[0]: is served by pools[0].models[0], got m"#,
            "pools[1].name: is taken by pools[0].name, got a",
            "pools[1].workers[0].endpoint: is taken by pools[0].workers[0].endpoint, got 1.1.1.1:1",
            "pools[1].workers[0].id: is taken by pools[0].workers[0].id, got 1",
            r#"pools[2].name: must match ^[A-Za-z0-9._-]{1,64}$, got "b c""#,
            r#"router_mode: belongs into a pool when there are `pools`, got "kv""#,
        ]
    );
}

#[test]
fn flags_lie_over_variables_and_variables_over_the_file() {
    let text = "http_port: 1\nrouter_mode: random\nkv_cache_block_size: 8";
    let mut layers = variables(&[
        ("DYN_HTTP_PORT", "2"),
        ("DYN_ROUTER_MODE", "round-robin"),
        ("DYN_KV_CACHE_BLOCK_SIZE", ""),
    ]);
    layers.extend(flags(&["--http-port", "3"]));
    let config = Config::parse(text, &layers).unwrap();
    assert_eq!(config.listen.port(), 3);
    assert_eq!(config.pools[0].policy.mode, Mode::RoundRobin);
    assert_eq!(config.pools[0].block_size, 8);
}

#[test]
fn a_pools_flag_reaches_every_pool() {
    let text = r#"pools: [{name: a}, {name: b, models: [m], kv_events: true}]"#;
    let layers = flags(&["--no-kv-events", "--kv-cache-block-size", "32"]);
    let config = Config::parse(text, &layers).unwrap();
    for pool in &config.pools {
        assert_eq!(
            (pool.block_size, pool.kv_events),
            (32, false),
            "{}",
            pool.name
        );
    }
    let on = variables(&[("DYN_ROUTER_USE_KV_EVENTS", "Off")]);
    assert!(!Config::parse(text, &on).unwrap().pools[1].kv_events);
}

#[test]
fn the_overlap_weight_scales_prefill_and_zero_drops_the_credit() {
    let policy = |weight: &str| {
        let layers = flags(&["--compat=dynamo", "--kv-overlap-score-weight", weight]);
        let config = Config::parse("{}", &layers).unwrap();
        let policy = config.pools[0].policy;
        (policy.prefill_load_scale, policy.overlap_score_credit)
    };
    assert_eq!(policy("2.5"), (2.5, 1.0));
    assert_eq!(policy("0"), (0.0, 0.0));
    let both = "compat: dynamo\nkv_overlap_score_weight: 1\nprefill_load_scale: 2";
    let both = refused(both, &[]);
    assert_eq!(
        both,
        ["kv_overlap_score_weight: excludes prefill_load_scale and overlap_score_credit, got 1"]
    );
}

#[test]
fn delays_are_predicted_unless_a_pool_or_compat_says_dynamo() {
    let policies = |text: &str, arguments: &[&str]| {
        let config = Config::parse(text, &flags(arguments)).unwrap();
        let pools = config.pools.into_iter();
        pools.map(|pool| pool.policy).collect::<Vec<_>>()
    };
    let scoring = |text: &str, arguments: &[&str]| policies(text, arguments)[0].scoring;
    assert_eq!(scoring("{}", &[]), Scoring::PredictedDelay);
    assert_eq!(scoring("{}", &["--compat", "dynamo"]), Scoring::Dynamo);
    assert_eq!(scoring("{}", &["--policy", "dynamo"]), Scoring::Dynamo);
    let two = "pools: [{name: a, policy: dynamo}, {name: b, models: [m]}]";
    let two = policies(two, &[]).into_iter().map(|policy| policy.scoring);
    assert_eq!(
        two.collect::<Vec<_>>(),
        [Scoring::Dynamo, Scoring::PredictedDelay]
    );
    let weights = "predicted_delay: {waiting_weight: 0.5, backlog_floor: 0, band_ms: 5}";
    let delay = policies(weights, &[])[0].delay;
    assert_eq!(
        (delay.waiting, delay.backlog_floor, delay.band_ms),
        (0.5, 0.0, 5.0)
    );
    assert_eq!(delay.decoding, 0.03);
}

#[test]
fn compat_gives_dynamos_formula_and_takes_all_its_knobs() {
    let knobs = [
        ("prefill_load_scale", "DYN_ROUTER_PREFILL_LOAD_SCALE"),
        ("overlap_score_credit", "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT"),
        (
            "overlap_score_credit_decay",
            "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
        ),
        ("host_cache_hit_weight", "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT"),
        ("disk_cache_hit_weight", "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT"),
        ("shared_cache_multiplier", "DYN_SHARED_CACHE_MULTIPLIER"),
        (
            "decode_active_request_weight",
            "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
        ),
        ("router_temperature", "DYN_ROUTER_TEMPERATURE"),
    ];
    let of = |text: &str, layers: &[Layer]| Config::parse(text, layers).unwrap().pools[0].policy;
    let defaults = Policy {
        scoring: Scoring::Dynamo,
        shared_cache_multiplier: 0.0,
        ..Policy::default()
    };
    assert_eq!(of("compat: dynamo", &[]), defaults);
    for (key, variable) in knobs {
        let layers = variables(&[(variable, "0.7")]);
        let policy = of("compat: dynamo", &layers);
        assert_eq!(of(&format!("compat: dynamo\n{key}: 0.7"), &[]), policy);
        assert_ne!(policy, defaults, "{key}");
    }
}

#[test]
fn knobs_that_would_do_nothing_are_refused() {
    let text = r#"
overlap_score_credit_decay: 0.5
decode_active_request_weight: 1
"#;
    let layers = flags(&["--router-prefill-load-scale", "4"]);
    let why = "is of Dynamo's formula alone and takes policy: dynamo, or compat: dynamo";
    assert_eq!(
        refused(text, &layers),
        [
            format!("decode_active_request_weight: {why}, got 1"),
            format!("overlap_score_credit_decay: {why}, got 0.5"),
            format!("prefill_load_scale: {why}, got 4 (from --router-prefill-load-scale)"),
        ]
    );
    assert_eq!(
        refused("kv_overlap_score_weight: 0", &[]),
        [format!("kv_overlap_score_weight: {why}, got 0")]
    );
}

#[test]
fn text_that_is_no_yaml_map_is_refused() {
    assert_eq!(
        refused("[1]", &[]),
        ["not valid YAML: the document is not a map"]
    );
    for broken in ["a: [", "http_port: 1\nhttp_port: 2"] {
        let errors = Config::parse(broken, &[]).unwrap_err().to_string();
        assert!(errors.starts_with("not valid YAML: "), "{errors}");
    }
}

#[test]
fn examples_keep_to_the_schema_and_make_sense() {
    let validator = jsonschema::validator_for(schema()).unwrap();
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../envoy/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        let errors: Vec<_> = validator
            .iter_errors(&value)
            .map(|e| e.to_string())
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        Config::parse(&text, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        seen += 1;
    }
    assert!(seen >= 3);
}

#[test]
fn the_schema_describes_every_key_and_refuses_others() {
    let schema = schema();
    assert!(jsonschema::meta::is_valid(schema));
    for of in [
        "/properties",
        "/$defs/Pool/properties",
        "/$defs/Worker/properties",
    ] {
        for (key, value) in schema.pointer(of).unwrap().as_object().unwrap() {
            assert!(value.get("description").is_some(), "{of}/{key}");
        }
    }
    let short = serde_json::json!({"workers": [{"id": 1, "endpoint": "1.1.1.1:1"}]});
    assert!(jsonschema::is_valid(schema, &short));
    let typo = serde_json::json!({"worker": []});
    assert!(!jsonschema::is_valid(schema, &typo));
}

#[test]
fn a_reload_takes_workers_and_policies_and_names_what_needs_a_restart() {
    let before = "state_dir: /a\nworkers: [{id: 1, endpoint: '1.1.1.1:1'}]";
    let before = Config::parse(before, &[]).unwrap();
    let text = "http_port: 9\nrouter_mode: random\nrouter_track_prefill_tokens: false\n\
                kv_cache_block_size: 64\nkv_events: false\nindexer: {}\n\
                workers: [{id: 2, endpoint: '1.1.1.1:2'}]";
    let next = Config::parse(text, &[]).unwrap();
    let (taken, restart) = before.reloaded(&next).unwrap();
    assert_eq!(restart, ["http_port", "indexer", "state_dir"]);
    assert_eq!((&taken.pools, taken.load), (&next.pools, next.load));
    let kept = (taken.listen, &taken.indexer, &taken.state_dir);
    assert_eq!(kept, (before.listen, &None, &before.state_dir));
    assert_eq!(before.reloaded(&before).unwrap(), (before, Vec::new()));
}

#[test]
fn a_reload_keeps_pools_whose_names_have_changed() {
    let pools = |names: &[&str], mode: &str| {
        let pool = |name: &&str| format!("{{name: {name}, models: [{name}], router_mode: {mode}}}");
        let pools: Vec<String> = names.iter().map(pool).collect();
        let text = format!("pools: [{}]", pools.join(","));
        Config::parse(&text, &[]).unwrap()
    };
    let before = pools(&["a", "b"], "kv");
    let next = pools(&["a", "b"], "random");
    assert_eq!(before.reloaded(&next).unwrap(), (next, Vec::new()));
    for names in [["b", "a"].as_slice(), &["a"], &["a", "b", "c"]] {
        let (taken, restart) = before.reloaded(&pools(names, "random")).unwrap();
        assert_eq!(restart, ["pools[].name"]);
        assert_eq!(taken, before);
    }
}

#[test]
fn load_is_tracked_as_in_dynamo_unless_flags_say_otherwise() {
    let text = "router_assume_kv_reuse: false\nactive_request_expiry_secs: 60";
    let load = Config::parse(text, &[]).unwrap().load;
    assert!(load.tracking.prefill_tokens && load.tracking.active_blocks);
    assert_eq!((load.tracking.kv_reuse, load.expiry_ms), (false, 60_000));

    let mut layers = variables(&[
        ("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", "1.5"),
        ("DYN_ROUTER_TTL_SECS", "30"),
    ]);
    layers.extend(flags(&[
        "--no-router-track-prefill-tokens",
        "--no-router-track-active-blocks",
        "--router-assume-kv-reuse",
    ]));
    let config = Config::parse(text, &layers).unwrap();
    let tracking = config.load.tracking;
    assert_eq!(
        (
            tracking.prefill_tokens,
            tracking.active_blocks,
            tracking.kv_reuse
        ),
        (false, false, true)
    );
    assert_eq!(config.load.expiry_ms, 1_500);
    assert_eq!(config.pools[0].ttl_ms, 30_000);

    let before = Config::parse("", &[]).unwrap();
    assert_eq!(before.reloaded(&config).unwrap(), (config, Vec::new()));
}

const WITH_EVENTS: &str = r#"
media: {tape: external}
families:
  - {family: flex-kv, media: [ssd, CPU]}
  - {family: lm-cache, media: [Tape], block_size: 256}
workers:
  - id: 1
    endpoint: "1.2.3.4:80"
    data_parallel_size: 2
    events: {zmq: {endpoint: "tcp://engine-1:5557", topic: kv-events, replay_endpoint: "tcp://engine-1:5567"}}
  - {id: 2, endpoint: "1.2.3.4:81", events: {trtllm: {url: "http://10.0.0.1:8000/kv_cache_events"}}}
  - {id: 3, endpoint: "1.2.3.4:82", events: {http: {token_file: /dev/null}}}
"#;

#[test]
fn a_worker_may_have_a_stream_of_its_own() {
    let config = Config::parse(WITH_EVENTS, &[]).unwrap();
    let pool = &config.pools[0];
    let events: Vec<_> = pool.workers.iter().map(|w| w.events.clone()).collect();
    let [
        Some(Events::Zmq {
            endpoint,
            topic,
            replay,
        }),
        Some(Events::TrtLlm { url, poll }),
        http,
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(topic, "kv-events");
    assert_eq!(endpoint.of(1).as_deref(), Some("engine-1:5558"));
    let replay = replay.as_ref().and_then(|replay| replay.of(0));
    assert_eq!(replay.as_deref(), Some("engine-1:5567"));
    assert_eq!(url.path(), "/kv_cache_events");
    assert_eq!(poll.as_millis(), 50);
    let expected = Events::Http {
        token_file: Some("/dev/null".into()),
        trusts_loopback: false,
    };
    assert_eq!(*http, Some(expected));
    assert_eq!(pool.media.tier("TAPE"), Some(Tier::External));
    let uses = [
        (Family::FlexKv, vec!["SSD", "CPU"], 16),
        (Family::LmCache, vec!["TAPE"], 256),
    ];
    for (used, (family, media, block_size)) in pool.families.iter().zip(uses) {
        assert_eq!((used.family, used.block_size), (family, block_size));
        assert_eq!(used.media, media);
    }
}

#[test]
fn a_pool_whose_media_change_reads_its_events_anew() {
    let before = Config::parse(WITH_EVENTS, &[]).unwrap();
    let after = Config::parse(&WITH_EVENTS.replace("external", "disk"), &[]).unwrap();
    let (taken, restart) = before.reloaded(&after).unwrap();
    assert_eq!((&taken, restart), (&after, Vec::new()));
    assert!(before.pools[0].reads_otherwise(&taken.pools[0]));
    assert!(!before.pools[0].reads_otherwise(&before.pools[0]));
}

#[test]
fn streams_of_events_that_make_no_sense_are_refused() {
    let text = r#"
media: {"": disk, odd: attic}
families:
  - {family: dynamo, media: [CPU]}
  - {family: flex-kv, media: [cpu, VAULT], block_size: 24}
workers:
  - {id: 1, endpoint: "1.2.3.4:80", events: {}}
  - {id: 2, endpoint: "1.2.3.4:81", events: {zmq: {endpoint: "tcp://*:5557"}}}
  - {id: 3, endpoint: "1.2.3.4:82", events: {zmq: {endpoint: "tcp://a:65535"}}, data_parallel_size: 2}
  - {id: 4, endpoint: "1.2.3.4:83", events: {zmq: {endpoint: "tcp://b:1"}}, data_parallel_size: 2}
  - {id: 5, endpoint: "1.2.3.4:84", events: {zmq: {endpoint: "tcp://b:2"}}}
  - {id: 6, endpoint: "1.2.3.4:85", events: {trtllm: {url: "ftp://b:2"}, http: {token_file: /nowhere}}}
  - {id: 7, endpoint: "1.2.3.4:86", events: {trtllm: {poll_ms: 0}}}
"#;
    assert_eq!(
        refused(text, &[]),
        [
            "families[0].family: must be an engine's: Dynamo's hashes come from token ids, got dynamo",
            "families[1].block_size: must be a multiple of kv_cache_block_size, 16, got 24",
            "families[1].media[0]: is taken by families[0].media[0], got CPU",
            "families[1].media[1]: is no medium: give its tier under `media`, got VAULT",
            r#"media.odd: must be one of device, host, disk, external, got "attic""#,
            r#"media: must have names of 1 to 64 bytes, got """#,
            "workers[0].events: must have one of zmq, trtllm and http, got 0 of them",
            r#"workers[1].events.zmq.endpoint: must be tcp://host:port, got "tcp://*:5557""#,
            "workers[2].events.zmq.endpoint: leaves no port for rank 1, got tcp://a:65535",
            "workers[4].events.zmq.endpoint: is read by workers[3].events.zmq.endpoint, got b:2",
            "workers[5].events.http.token_file: can't be read (No such file or directory (os error 2)), got /nowhere",
            r#"workers[5].events.trtllm.url: must be a URL such as http://host:8000/kv_cache_events, got "ftp://b:2""#,
            "workers[5].events: must have one of zmq, trtllm and http, got 2 of them",
            "workers[6].events.trtllm.poll_ms: must be at least 1, got 0",
            "workers[6].events.trtllm.url: missing",
        ]
    );
}
