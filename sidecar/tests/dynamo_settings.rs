//! Every setting of Dynamo's router is taken with the effect it states, or refused with a sentence.

use clap::{Args as _, FromArgMatches as _};
use kv_router::config::{Effective, Flags, Layer, from_environment};
use serde_json::Value;

const SETTINGS: &str = include_str!("fixtures/dynamo-settings.txt");
/// What the settings need around them, with values that none of them gives.
const FILE: &str = r#"
compat: dynamo
nats: {url: "nats://127.0.0.1:4222", dynamo: {namespace: dynamo, component: backend}}
"#;

fn layers(name: &str, value: &str) -> Vec<Layer> {
    if name.starts_with("--") {
        let command = Flags::augment_args(clap::Command::new("kv-router"));
        let arguments = ["kv-router", name, value];
        let given = arguments.into_iter().filter(|a| !a.is_empty());
        let matches = command.try_get_matches_from(given);
        let matches = matches.unwrap_or_else(|e| panic!("{name} {value}: {e}"));
        Flags::from_arg_matches(&matches).unwrap().layers
    } else {
        from_environment([(name.to_owned(), value.to_owned())])
    }
}

fn value_of(effective: &Effective, key: &str) -> (Value, String) {
    let found = effective.keys.iter().find(|k| k.key == key);
    let found = found.unwrap_or_else(|| panic!("no key {key}"));
    (found.value.clone(), found.from.to_string())
}

#[test]
fn every_setting_of_dynamos_router_has_its_effect_or_is_refused_with_a_sentence() {
    let mut settings = 0;
    let lines = SETTINGS
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'));
    for line in lines {
        let (given, expected) = line.split_once(" : ").expect(line);
        let (name, value) = given.split_once(' ').unwrap_or((given, ""));
        let layers = layers(name, value);
        let outcome = Effective::parse(FILE, &layers);
        settings += 1;
        match (expected, outcome) {
            ("refused", Err(errors)) => {
                let text = errors.to_string();
                let (said_of, sentence) = text.split_once(": ").expect(&text);
                assert_eq!((said_of, errors.problems().count()), (name, 1), "{text}");
                assert!(sentence.split(' ').count() >= 4, "{text}");
            }
            ("let be", Ok(effective)) => {
                let [note] = effective.notes.as_slice() else {
                    panic!("{line}: {:?}", effective.notes);
                };
                assert_eq!(note.name, name);
                assert!(note.why.split(' ').count() >= 4, "{note}");
            }
            ("nothing", Ok(effective)) => assert!(effective.notes.is_empty(), "{line}"),
            (keys, Ok(effective)) => {
                assert!(effective.notes.is_empty(), "{line}");
                for (i, key) in keys.split(' ').enumerate() {
                    let (key, value) = key.split_once('=').expect(line);
                    let value: Value = serde_json::from_str(value).expect(line);
                    let (found, from) = value_of(&effective, key);
                    assert_eq!(found, value, "{line}");
                    let is_set = i == 0 || from == name;
                    assert!(
                        is_set || from == "key kv_overlap_score_weight",
                        "{line}: {from}"
                    );
                }
            }
            (_, Err(errors)) => panic!("{line}: {errors}"),
        }
    }
    assert!(settings > 150, "{settings}");
}

#[test]
fn a_flag_lies_over_a_variable_over_the_file_over_compat_over_the_default() {
    let text = "compat: dynamo\nrouter_temperature: 0.1\n";
    let variable = ("DYN_ROUTER_TEMPERATURE".to_owned(), "0.2".to_owned());
    let mut over = from_environment([variable]);
    over.extend(layers("--router-temperature", "0.3"));
    let effective = Effective::parse(text, &over).unwrap();
    let key = effective
        .keys
        .iter()
        .find(|k| k.key == "router_temperature");
    let key = key.unwrap();
    assert_eq!(key.value, 0.3);
    assert_eq!(key.from.to_string(), "--router-temperature");
    let overruled: Vec<String> = key.over.iter().map(ToString::to_string).collect();
    assert_eq!(overruled, ["DYN_ROUTER_TEMPERATURE", "line 2"]);
    let says = |key| value_of(&effective, key);
    assert_eq!(says("policy"), ("dynamo".into(), "compat".into()));
    assert_eq!(
        says("shared_cache_multiplier"),
        (0.0.into(), "compat".into())
    );
    assert_eq!(says("router_mode"), ("kv".into(), "default".into()));
    assert_eq!(says("state_dir"), (Value::Null, "default".into()));
    assert_eq!(says("prefill_load_scale"), (1.0.into(), "default".into()));

    let effective = Effective::parse("", &[]).unwrap();
    let multiplier = value_of(&effective, "shared_cache_multiplier");
    assert_eq!(multiplier, (0.5.into(), "default".into()));
    let policy = value_of(&effective, "policy");
    assert_eq!(policy, ("predicted-delay".into(), "default".into()));
}

#[test]
fn what_lies_lower_of_two_variables_is_named_too() {
    let variables = [
        ("DYN_USE_KV_EVENTS", "1"),
        ("DYN_ROUTER_USE_KV_EVENTS", "0"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let effective = Effective::parse("", &from_environment(variables)).unwrap();
    let key = effective
        .keys
        .iter()
        .find(|k| k.key == "kv_events")
        .unwrap();
    assert_eq!(
        (&key.value, key.from.to_string()),
        (&false.into(), "DYN_ROUTER_USE_KV_EVENTS".into())
    );
    assert_eq!(key.over.len(), 1);
}

#[test]
fn the_table_tells_a_pools_keys_by_their_places_and_no_password() {
    let text = r#"
nats: {url: "nats://me:secret@one:4222,nats://two", json_subject: "a.{worker_id}"}
pools:
  - {name: a, models: [a], workers: [{id: 1, endpoint: "1.1.1.1:1"}]}
  - {name: b, models: [b], router_mode: random}
"#;
    let temperature = layers("--router-temperature", "1");
    let effective = Effective::parse(text, &temperature).unwrap();
    let says = |key| value_of(&effective, key);
    assert_eq!(says("nats.url").0, "nats://***@one:4222,nats://two");
    assert_eq!(
        says("pools[1].router_mode"),
        ("random".into(), "line 5".into())
    );
    assert_eq!(says("pools[0].workers[0].endpoint").1, "line 4");
    assert_eq!(
        says("pools[1].router_temperature").1,
        "--router-temperature"
    );
    let table = effective.to_string();
    let row = table.lines().find(|line| line.starts_with("http_port"));
    let row: Vec<&str> = row.unwrap().split("  ").filter(|c| !c.is_empty()).collect();
    let expected = [
        "http_port",
        "8000",
        "default",
        "both: the listener is in envoy's bootstrap",
    ];
    assert_eq!(row.iter().map(|c| c.trim()).collect::<Vec<_>>(), expected);
    assert!(!table.contains("secret"));
}
