//! Random request bodies, as text.

use proptest::{collection::vec, prelude::*, sample::select};

const KEYS: [&str; 8] = [
    "prompt",
    "model",
    "cache_salt",
    "stream",
    "max_tokens",
    "messages",
    "nvext",
    "",
];

fn space() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just(""), 2 => Just(" "), 1 => select(&["\n", "\t ", "\r\n  ", "   "][..])]
}

/// A string literal for `text`, some of its characters escaped.
fn quoted(text: &str) -> impl Strategy<Value = String> + use<> {
    let units: Vec<char> = text.chars().collect();
    vec(0u8..8, units.len()).prop_map(move |choices| {
        let mut literal = String::from('"');
        for (&character, choice) in units.iter().zip(choices) {
            match (character, choice) {
                (_, 0) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        literal += &format!("\\u{unit:04x}");
                    }
                }
                ('"', _) => literal += "\\\"",
                ('\\', _) => literal += "\\\\",
                ('/', 1) => literal += "\\/",
                ('\n', _) => literal += "\\n",
                ('\0'..' ', _) => literal += &format!("\\u{:04X}", character as u32),
                _ => literal.push(character),
            }
        }
        literal + "\""
    })
}

fn text() -> impl Strategy<Value = String> {
    let characters = prop_oneof![
        8 => select(&['a', 'b', '0', ' '][..]),
        3 => select(&['"', '\\', '/', '\n', '[', ']', '{', '}', ',', ':', '\u{7}'][..]),
        2 => select(&['é', '語', '😀'][..]),
    ];
    let text = vec(characters, 0..40).prop_map(String::from_iter);
    prop_oneof![20 => text, 1 => (1000usize..1100).prop_map(|n| "x".repeat(n))]
        .prop_flat_map(|text| quoted(&text))
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof![
        (0u64..100).prop_map(|n| n.to_string()),
        any::<u64>().prop_map(|n| n.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        select(
            &[
                "-0",
                "0.5",
                "1.0",
                "1e2",
                "-2E+3",
                "3e-1",
                "18446744073709551616",
                "4294967296"
            ][..]
        )
        .prop_map(str::to_owned),
    ]
}

fn id() -> impl Strategy<Value = u32> {
    prop_oneof![20 => 0u32..200_000, 5 => 0u32..12, 1 => any::<u32>(), 1 => 0u32..=99_999_999]
}

/// An array of ids; the separators are equal, except for a few.
fn ids(count: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    let separator = prop_oneof![
        3 => Just(",".to_owned()),
        3 => Just(", ".to_owned()),
        1 => Just(",\n    ".to_owned()),
        1 => Just(" ,\t".to_owned()),
        1 => (1usize..70).prop_map(|n| format!(",{}", " ".repeat(n))),
    ];
    let exception = prop_oneof![300 => Just(None), 1 => (space(), space()).prop_map(Some)];
    let parts = vec((id(), exception), count);
    (space(), separator, parts, space()).prop_map(|(open, separator, parts, close)| {
        let mut array = format!("[{open}");
        for (at, (id, exception)) in parts.iter().enumerate() {
            if at > 0 {
                match exception {
                    Some((before, after)) => array += &format!("{before},{after}"),
                    None => array += &separator,
                }
            }
            array += &id.to_string();
        }
        array + close + "]"
    })
}

/// An array of `items`.
fn array(items: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    (vec((items, space()), 0..5), space()).prop_map(|(items, close)| {
        let items: Vec<String> = items.into_iter().map(|(item, s)| item + s).collect();
        format!("[{}{close}]", items.join(","))
    })
}

fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        number(),
        text(),
        select(&["null", "true", "false"][..]).prop_map(str::to_owned),
        ids(0..4),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        let member =
            (text(), space(), inner.clone()).prop_map(|(k, s, v)| format!("{k}{s}:{s}{v}"));
        prop_oneof![
            array(inner),
            vec(member, 0..4).prop_map(|members| format!("{{{}}}", members.join(" ,"))),
        ]
    })
}

fn member() -> impl Strategy<Value = (String, String)> {
    let keys = prop_oneof![
        10 => select(&KEYS[..]).prop_flat_map(quoted),
        1 => text(),
    ];
    let prompts = Just("\"prompt\"".to_owned());
    let ids = prop_oneof![
        ids(0..500),
        (space(), ids(0..40), space()).prop_map(|(a, ids, b)| format!("[{a}{ids}{b}]")),
        array(value()),
        array(number()),
    ];
    prop_oneof![3 => (keys, value()), 1 => (prompts, ids)]
}

/// A JSON object.
pub(super) fn body() -> impl Strategy<Value = String> {
    let members = vec(((space(), space()), member(), (space(), space())), 0..9);
    (space(), members, space()).prop_map(|(before, members, after)| {
        let members: Vec<String> = members
            .into_iter()
            .map(|((a, b), (key, value), (c, d))| format!("{a}{key}{b}:{c}{value}{d}"))
            .collect();
        format!("{before}{{{}}}{after}", members.join(","))
    })
}
