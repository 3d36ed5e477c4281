//! The scanner against a full parse.

mod body;

use std::ops::Range;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::hash::Seed;

const LIMIT: usize = 1 << 20;

fn scan(chunks: &[&[u8]]) -> Result<Scan, ScanError> {
    let mut scanner = Scanner::new(LIMIT);
    for chunk in chunks {
        scanner.feed(chunk);
    }
    scanner.finish()
}

fn scan_str(body: &str) -> Result<Scan, ScanError> {
    scan(&[body.as_bytes()])
}

fn prompt(body: &str) -> Prompt {
    scan_str(body).unwrap().prompt
}

#[track_caller]
fn assert_ids(body: &str, ids: &[u32]) {
    match prompt(body) {
        Prompt::Tokens(tokens) => assert_eq!(tokens.ids(), ids),
        other => panic!("{other:?}"),
    }
}

fn syntax_at(body: &str) -> usize {
    match scan_str(body) {
        Err(ScanError::Syntax { offset }) => offset,
        other => panic!("{other:?}"),
    }
}

/// What the scanner must find, taken from a full parse.
#[derive(Debug, PartialEq)]
struct Parsed {
    prompt: Prompt,
    model: Field<String>,
    cache_salt: Field<String>,
    stream: Field<bool>,
    max_tokens: Field<u64>,
}

fn parsed(body: &Value) -> Parsed {
    Parsed {
        prompt: parsed_prompt(&body["prompt"]),
        model: parsed_string(&body["model"]),
        cache_salt: parsed_string(&body["cache_salt"]),
        stream: parsed_field(&body["stream"], Value::as_bool),
        max_tokens: parsed_field(&body["max_tokens"], Value::as_u64),
    }
}

fn parsed_field<T>(value: &Value, get: impl Fn(&Value) -> Option<T>) -> Field<T> {
    match value {
        Value::Null => Field::Absent,
        value => get(value).map_or(Field::Other, Field::Value),
    }
}

fn parsed_string(value: &Value) -> Field<String> {
    match value {
        Value::String(text) if text.len() > MAX_STRING => Field::TooLong,
        value => parsed_field(value, |value| value.as_str().map(str::to_owned)),
    }
}

fn parsed_prompt(value: &Value) -> Prompt {
    let ids = |items: &[Value]| -> Option<Vec<u32>> {
        items
            .iter()
            .map(|id| id.as_u64()?.try_into().ok())
            .collect()
    };
    let tokens = |ids| {
        Prompt::Tokens(Tokens {
            ids,
            ..Tokens::default()
        })
    };
    match value {
        Value::Null => Prompt::Absent,
        Value::String(_) => Prompt::Text,
        Value::Array(items) => match (ids(items), items.as_slice()) {
            (Some(ids), _) => tokens(ids),
            (None, [Value::String(_), ..]) => Prompt::Text,
            (None, [Value::Array(items)]) => ids(items).map_or(Prompt::Unsupported, tokens),
            (None, _) => Prompt::Unsupported,
        },
        _ => Prompt::Unsupported,
    }
}

/// Equality with a full parse, as far as one takes the body.
fn check(body: &[u8], chunks: &[&[u8]]) -> Result<(), TestCaseError> {
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        let _ = scan(chunks);
        return Ok(());
    };
    let Value::Object(object) = &value else {
        prop_assert_eq!(scan(chunks), Err(ScanError::NotAnObject));
        return Ok(());
    };
    let scan = scan(chunks);
    prop_assert!(scan.is_ok(), "{:?}", scan);
    let scan = scan.unwrap();
    for (key, value) in object {
        if key.len() <= MAX_KEY {
            let range = scan.members.get(key).unwrap();
            let found: Value = serde_json::from_slice(&body[range]).unwrap();
            prop_assert_eq!(&found, value);
        }
    }
    for (key, _) in scan.members.iter() {
        prop_assert!(object.contains_key(key));
    }
    let found = Parsed {
        prompt: scan.prompt,
        model: scan.model,
        cache_salt: scan.cache_salt,
        stream: scan.stream,
        max_tokens: scan.max_tokens,
    };
    prop_assert_eq!(found, parsed(&value));
    Ok(())
}

/// `body` cut at `cuts`, which count in 65536ths of its length.
fn cut<'a>(body: &'a [u8], cuts: &[u16]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts
        .iter()
        .map(|cut| (usize::from(*cut) * body.len()) >> 16)
        .collect();
    places.sort_unstable();
    places.push(body.len());
    let mut from = 0;
    let mut chunks = Vec::new();
    for to in places {
        chunks.push(&body[from..to]);
        from = to;
    }
    chunks
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_body_reads_as_a_full_parse_does(
        body in body::body(),
        cuts in prop::collection::vec(any::<u16>(), 0..6),
    ) {
        // The generator is checked too: what it makes is JSON.
        prop_assert!(serde_json::from_str::<Value>(&body).is_ok(), "{}", body);
        check(body.as_bytes(), &cut(body.as_bytes(), &cuts))?;
    }

    #[test]
    fn single_bytes_read_as_the_whole(body in body::body()) {
        let bytes: Vec<&[u8]> = body.as_bytes().chunks(1).collect();
        prop_assert_eq!(scan(&bytes), scan(&[body.as_bytes()]));
    }

    #[test]
    fn broken_bodies_read_as_a_full_parse_does(
        body in body::body(),
        breaks in prop::collection::vec((any::<prop::sample::Index>(), 0u8..4, mutant()), 1..4),
        cuts in prop::collection::vec(any::<u16>(), 0..4),
    ) {
        let mut body = body.into_bytes();
        for (place, kind, byte) in breaks {
            let at = place.index(body.len());
            match kind {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                2 => { body.remove(at); }
                _ => body.truncate(at),
            }
            if body.is_empty() {
                break;
            }
        }
        check(&body, &cut(&body, &cuts))?;
    }

    #[test]
    fn noise_never_panics(
        noise in prop::collection::vec(mutant(), 0..200),
        cuts in prop::collection::vec(any::<u16>(), 0..4),
    ) {
        check(&noise, &cut(&noise, &cuts))?;
    }

    #[test]
    fn hashing_along_the_way_gives_the_hashes_of_the_whole(
        ids in prop::collection::vec(0u32..200_000, 0..300),
        cuts in prop::collection::vec(any::<u16>(), 0..5),
        sizes in prop::collection::vec(prop::sample::select(&[0usize, 1, 16, 32, 40][..]), 7),
        eagle: bool,
        seed: u64,
    ) {
        let body = format!("{{\"prompt\":{ids:?},\"model\":\"m\"}}");
        let hashing = |block_size| Hashing { block_size, eagle, seed: Seed(seed) };
        let mut scanner = Scanner::new(LIMIT);
        for (chunk, size) in cut(body.as_bytes(), &cuts).into_iter().zip(&sizes) {
            scanner.feed(chunk);
            scanner.hash(hashing(*size));
        }
        let Prompt::Tokens(mut tokens) = scanner.finish().unwrap().prompt else {
            unreachable!()
        };
        let expected = sequence_hashes(&ids, hashing(sizes[6]));
        prop_assert_eq!(tokens.hashes(hashing(sizes[6])), &expected);
        prop_assert_eq!(tokens.ids(), &ids);
    }
}

/// Bytes that mean something in JSON more often than others.
fn mutant() -> impl Strategy<Value = u8> {
    prop_oneof![
        3 => prop::sample::select(&b"{}[]\",:\\u0123456789 \n-.eEtfn"[..]),
        1 => any::<u8>(),
    ]
}

#[test]
fn single_prompt_within_an_array_is_read() {
    assert_ids(r#"{"prompt": [ [1, 2 ,3] ] }"#, &[1, 2, 3]);
    assert_ids(r#"{"prompt": [[]]}"#, &[]);
    assert_ids(r#"{"prompt": []}"#, &[]);
    for body in [
        r#"{"prompt":[[1],[2]]}"#,
        r#"{"prompt":[[[1]]]}"#,
        r#"{"prompt":[[1],2]}"#,
    ] {
        assert_eq!(prompt(body), Prompt::Unsupported, "{body}");
    }
}

#[test]
fn prompts_that_are_not_ids_are_told_apart() {
    for body in [
        r#"{"prompt":"hi"}"#,
        r#"{"prompt":["a","b"]}"#,
        r#"{"prompt":[ "a" ]}"#,
    ] {
        assert_eq!(prompt(body), Prompt::Text, "{body}");
    }
    for body in [
        r#"{"prompt":[-1]}"#,
        r#"{"prompt":[1.0]}"#,
        r#"{"prompt":[1,2e1]}"#,
        r#"{"prompt":[4294967296]}"#,
        r#"{"prompt":[1,"a"]}"#,
        r#"{"prompt":[[1,null]]}"#,
        r#"{"prompt":{"ids":[1]}}"#,
        r#"{"prompt":7}"#,
        r#"{"prompt":true}"#,
    ] {
        assert_eq!(prompt(body), Prompt::Unsupported, "{body}");
    }
    assert_eq!(prompt(r#"{"prompt":[1],"prompt":null}"#), Prompt::Absent);
    assert_eq!(prompt(r#"{"messages":[]}"#), Prompt::Absent);
}

#[test]
fn largest_ids_are_read() {
    assert_ids(
        r#"{"prompt":[4294967295,0,99999999,100000000]}"#,
        &[u32::MAX, 0, 99_999_999, 100_000_000],
    );
}

#[test]
fn escaped_keys_equal_plain_ones() {
    let body = r#"{"\u0070rompt":[1],"mod\u0065l":"\ud83d\ude00\/"}"#;
    assert_ids(body, &[1]);
    let scan = scan_str(body).unwrap();
    assert_eq!(scan.model, Field::Value("😀/".to_owned()));
    assert!(scan.members.get("prompt").is_some());
}

#[test]
fn ids_keep_to_the_limit() {
    let ids: Vec<u32> = (0..1000).collect();
    let body = format!("{{\"prompt\":{ids:?},\"model\":\"m\"}}");
    for (limit, too_many) in [0, 1, 299, 300, 999, 1000, 1001].map(|limit| (limit, limit < 1000)) {
        let mut scanner = Scanner::new(limit);
        scanner.feed(body.as_bytes());
        let scan = scanner.finish().unwrap();
        assert_eq!(scan.prompt == Prompt::TooManyTokens, too_many, "{limit}");
        assert_eq!(scan.model, Field::Value("m".to_owned()));
    }
}

#[test]
fn long_strings_are_told_but_not_kept() {
    let long = "x".repeat(MAX_STRING + 1);
    let body = format!("{{\"model\":\"{long}\",\"cache_salt\":\"{}\"}}", &long[1..]);
    let scan = scan_str(&body).unwrap();
    assert_eq!(scan.model, Field::TooLong);
    assert_eq!(scan.cache_salt, Field::Value(long[1..].to_owned()));
}

#[test]
fn members_are_listed_in_order_up_to_the_bound() {
    let members: Vec<String> = (0..MAX_MEMBERS + 3)
        .map(|n| format!("\"k{n}\":{n}"))
        .collect();
    let long = "k".repeat(MAX_KEY + 1);
    let body = format!("{{\"{long}\":0,{},\"model\":\"m\"}}", members.join(","));
    let scan = scan_str(&body).unwrap();
    let expected: Vec<(String, String)> = (0..MAX_MEMBERS)
        .map(|n| (format!("k{n}"), n.to_string()))
        .collect();
    let found: Vec<(String, String)> = scan
        .members
        .iter()
        .map(|(key, range): (&str, Range<usize>)| (key.to_owned(), body[range].to_owned()))
        .collect();
    assert_eq!(found, expected);
    // The long key, three of the others and `model`.
    assert_eq!(scan.members.unlisted(), 5);
    assert_eq!(scan.model, Field::Value("m".to_owned()));
}

#[test]
fn values_count_once_they_ended() {
    let mut scanner = Scanner::new(LIMIT);
    scanner.feed(br#"{"model":"first","model":"sec"#);
    assert_eq!(scanner.so_far().model, Field::Absent);
    scanner.feed(br#"ond","stream":tr"#);
    assert_eq!(scanner.so_far().model, Field::Value("second".to_owned()));
    assert_eq!(scanner.so_far().stream, Field::Absent);
    scanner.feed(b"ue}");
    assert_eq!(scanner.finish().unwrap().stream, Field::Value(true));
}

#[test]
fn broken_json_is_told_with_its_place() {
    assert_eq!(syntax_at(r#"{"prompt":[1,,2]}"#), 13);
    assert_eq!(syntax_at(r#"{"prompt":[1 2]}"#), 13);
    assert_eq!(syntax_at(r#"{"prompt":[1,]}"#), 13);
    assert_eq!(syntax_at(r#"{"prompt":[01]}"#), 12);
    assert_eq!(syntax_at(r#"{"prompt":[1}"#), 12);
    assert_eq!(syntax_at(r#"{"model":"\ud800x"}"#), 16);
    assert_eq!(syntax_at(r#"{"model":"\x"}"#), 11);
    assert_eq!(syntax_at("{\"model\":\"\n\"}"), 10);
    assert_eq!(syntax_at(r#"{"a":1,}"#), 7);
    assert_eq!(syntax_at(r#"{"a":nul}"#), 8);
    assert_eq!(syntax_at(r#"{"a":01}"#), 6);
    assert_eq!(syntax_at(r#"{"a":1}}"#), 7);
    assert_eq!(syntax_at(r#"{"a" 1}"#), 5);
    assert_eq!(
        scan(&[b"{\"\xff\":1}"]),
        Err(ScanError::Syntax { offset: 3 })
    );
}

#[test]
fn irregular_ids_are_told_wherever_they_come() {
    let bodies = |at: usize, odd: &str| {
        [",", ", ", ",   "].map(|separator| {
            let mut ids: Vec<String> = (0..200).map(|id| (id * 37).to_string()).collect();
            ids[at] = odd.to_owned();
            format!("{{\"prompt\":[{}]}}", ids.join(separator))
        })
    };
    for at in 1..200 {
        for odd in [
            "012", "00", "", "1 2", "1, ", ",1", "x1", "\u{b}1", "1\u{0}",
        ] {
            for body in bodies(at, odd) {
                let found = scan_str(&body);
                assert!(matches!(found, Err(ScanError::Syntax { .. })), "{body}");
            }
        }
        for body in bodies(at, "37").iter().skip(1) {
            for junk in ['x', '\u{b}', '-', '\u{80}'] {
                let gap = body.match_indices(' ').nth(at - 1).unwrap().0;
                let body = format!("{}{junk}{}", &body[..gap], &body[gap + 1..]);
                assert_ne!(
                    scan_str(&body),
                    scan_str(&body.replace(junk, " ")),
                    "{body}"
                );
            }
        }
        for odd in [
            "1.5",
            "1e2",
            "-1",
            "\"1\"",
            "4294967296",
            "12345678901234567890",
            "null",
            "[1]",
        ] {
            for body in bodies(at, odd) {
                assert_eq!(prompt(&body), Prompt::Unsupported, "{body}");
            }
        }
        for (odd, id) in [
            ("123456789", 123_456_789),
            ("4294967295", u32::MAX),
            ("  7\t", 7),
        ] {
            for body in bodies(at, odd) {
                let ids: Vec<u32> = (0..200)
                    .map(|n| if n == at { id } else { n as u32 * 37 })
                    .collect();
                assert_ids(&body, &ids);
            }
        }
    }
}

#[test]
fn endless_numbers_are_no_ids() {
    for before in 215..230 {
        for digits in (10..30).chain(430..480).chain(890..910) {
            let (before, after) = ("1,".repeat(before), "1,".repeat(700));
            let body = format!("{{\"prompt\":[{before}{},{after}1]}}", "7".repeat(digits));
            assert_eq!(prompt(&body), Prompt::Unsupported, "{digits}");
        }
    }
}

#[test]
fn other_ends_have_their_own_errors() {
    assert_eq!(scan_str(""), Err(ScanError::Truncated));
    assert_eq!(scan_str(r#"{"a":1"#), Err(ScanError::Truncated));
    assert_eq!(scan_str(r#"{"a":{"b":"}"#), Err(ScanError::Truncated));
    assert_eq!(scan_str("[1]"), Err(ScanError::NotAnObject));
    let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    assert!(scan_str(&nested(MAX_DEPTH)).is_ok());
    assert_eq!(
        scan_str(&nested(MAX_DEPTH + 1)),
        Err(ScanError::TooDeep {
            offset: 5 + MAX_DEPTH
        })
    );
    let kinds = [ScanError::NotAnObject, ScanError::Truncated].map(|error| error.kind());
    assert_eq!(kinds, ["not_an_object", "truncated"]);
}
