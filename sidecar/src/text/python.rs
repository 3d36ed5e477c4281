//! Values as Python writes them, which templates were made for.
//!
//! - `json.dumps(value, ensure_ascii=False)`: a space after commas and colons, keys in their order,
//!   no HTML escapes.
//! - `str(value)`: `None`, `True`, the representation of what lists and maps hold.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};

/// Levels of nesting that are written.
const MAX_DEPTH: usize = 64;

/// A value as JSON; with `indent` spaces to a level, on lines of its own.
///
/// # Errors
/// Says what can't be written: a value that JSON has no form for, or one nested too deep.
pub(super) fn dumps(value: &Value, indent: Option<usize>) -> Result<String, String> {
    let mut out = String::new();
    write(value, indent, 0, &mut out)?;
    Ok(out)
}

/// A value as text.
///
/// # Errors
/// As [`dumps`].
pub(super) fn str(value: &Value) -> Result<String, String> {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => repr(value, 0, &mut out)?,
    }
    Ok(out)
}

fn repr(value: &Value, depth: usize, out: &mut String) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("nested more than {MAX_DEPTH} deep"));
    }
    match value.kind() {
        // What is undefined is printed as nothing.
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            out.push('[');
            for (at, item) in value.try_iter().map_err(|e| e.to_string())?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                repr(&item, depth + 1, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter().map_err(|e| e.to_string())?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                repr(&key, depth + 1, out)?;
                out.push_str(": ");
                let item = value.get_item(&key).map_err(|e| e.to_string())?;
                repr(&item, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string between the quotes that Python chooses.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                // Writing to a string can't fail.
                let _ = match code {
                    0..0x100 => write!(out, "\\x{code:02x}"),
                    0x100..0x1_0000 => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Whether Python prints a character as it is. Rust's debug form has the same rule, except for
/// quotes, and for marks at the start of a string.
fn is_printable(c: char) -> bool {
    matches!(c, '"' | '\'') || {
        let mut buffer = [b'a'; 5];
        let length = 1 + c.encode_utf8(&mut buffer[1..]).len();
        let text = std::str::from_utf8(&buffer[..length]).unwrap_or_default();
        text.escape_debug().nth(1) != Some('\\')
    }
}

fn write(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("nested more than {MAX_DEPTH} deep"));
    }
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter().map_err(|e| e.to_string())?;
            let items = items.map(|item| (None, item));
            list(('[', ']'), items, indent, depth, out)?;
        }
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter().map_err(|e| e.to_string())?.collect();
            let mut items = Vec::with_capacity(keys.len());
            for key in keys {
                let item = value.get_item(&key).map_err(|e| e.to_string())?;
                items.push((Some(key.to_string()), item));
            }
            list(('{', '}'), items.into_iter(), indent, depth, out)?;
        }
        kind => return Err(format!("a value of kind {kind} has no json")),
    }
    Ok(())
}

fn list(
    (open, close): (char, char),
    items: impl Iterator<Item = (Option<String>, Value)>,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), String> {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    let mut is_empty = true;
    for (key, item) in items {
        if !is_empty {
            // With an indent Python leaves out the space that would end the line.
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        is_empty = false;
        line(depth + 1, out);
        if let Some(key) = key {
            string(&key, out);
            out.push_str(": ");
        }
        write(&item, indent, depth + 1, out)?;
    }
    if !is_empty {
        line(depth, out);
    }
    out.push(close);
    Ok(())
}

fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        out.push_str(&value.to_string());
        return;
    }
    let float = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    out.push_str(&self::float(float));
}

/// A float as Python's `repr` has it: the shortest digits, an exponent below 1e-4 and from 1e16.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let size = value.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = value.to_string();
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}

fn string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => {
                // Writing to a string can't fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(json: &str, indent: Option<usize>) -> String {
        let value: Value = serde_json::from_str(json).unwrap();
        dumps(&value, indent).unwrap()
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let json = r#"{"b":[1,2.5,-0.0,1e20,1e-7,true,null],"a":{"<&'>":"caf\u00e9\n\u0001"},"e":[],"f":{}}"#;
        assert_eq!(
            dumped(json, None),
            "{\"b\": [1, 2.5, -0.0, 1e+20, 1e-07, true, null], \"a\": {\"<&'>\": \"caf\u{e9}\\n\\u0001\"}, \"e\": [], \"f\": {}}"
        );
        assert_eq!(
            dumped(r#"{"a":[1,{}],"b":2}"#, Some(2)),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": 2\n}"
        );
        assert_eq!(float(123_456_789.0), "123456789.0");
        assert_eq!(float(0.0001), "0.0001");
    }

    #[test]
    fn text_is_written_as_python_writes_it() {
        let json =
            r#"[null,true,1e-5,"it's","\"'","a\u00a0\u200d\u0301\n",{"k":[]},"\ud83d\ude00"]"#;
        let value: Value = serde_json::from_str(json).unwrap();
        assert_eq!(
            str(&value).unwrap(),
            "[None, True, 1e-05, \"it's\", '\"\\'', 'a\\xa0\\u200d\u{301}\\n', {'k': []}, '\u{1f600}']"
        );
        assert_eq!(str(&Value::from("it's\n")).unwrap(), "it's\n");
        assert_eq!(str(&Value::UNDEFINED).unwrap(), "");
    }

    #[test]
    fn what_nests_too_deep_is_refused() {
        let deep = "[".repeat(80) + &"]".repeat(80);
        let value: Value = serde_json::from_str(&deep).unwrap();
        assert!(dumps(&value, None).is_err());
        assert!(str(&value).is_err());
    }
}
