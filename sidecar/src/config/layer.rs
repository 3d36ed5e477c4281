//! Layers over the file, and the two forms it may have.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

use super::error::{ConfigErrors, Problem};
use super::schema::pool_keys;
use super::setting::{Effect, Setting};

/// Where a value over the file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An environment variable.
    Variable(String),
    /// A flag, without its dashes.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// One value to put over the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Who says so.
    pub origin: Origin,
    pub(super) setting: &'static Setting,
    pub(super) value: Value,
}

impl Layer {
    /// Why the value can't be taken.
    pub(super) fn refusal(&self) -> Option<Problem> {
        let (unless, why) = match self.setting.effect {
            Effect::Refused { unless, why } => (unless, why),
            // It would have become layers of keys.
            Effect::Preset(_) => (["false"].as_slice(), "must be true or false"),
            Effect::Key | Effect::Elsewhere(_) => return None,
        };
        let text = self.text();
        let is_taken = unless.contains(&text.to_ascii_lowercase().as_str());
        (!is_taken).then(|| Problem::Setting {
            name: self.origin.to_string(),
            value: text,
            why: why.into(),
        })
    }

    /// That the value does nothing, and why.
    #[must_use]
    pub fn note(&self) -> Option<Note> {
        let why = match self.setting.effect {
            Effect::Elsewhere(why) => why,
            // Refused otherwise.
            Effect::Refused { .. } => "it is so without being said",
            Effect::Key | Effect::Preset(_) => return None,
        };
        Some(Note {
            name: self.origin.to_string(),
            why,
        })
    }

    fn text(&self) -> String {
        match &self.value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }

    /// Puts the value in place; a pool's key goes into every pool.
    pub(super) fn put(&self, root: &mut Value) {
        if self.setting.effect != Effect::Key {
            return;
        }
        let Setting { key, pool, .. } = self.setting;
        match root.get_mut("pools").and_then(Value::as_array_mut) {
            Some(pools) if *pool => {
                for pool in pools {
                    self.put_at(pool, key);
                }
            }
            _ => self.put_at(root, key),
        }
    }

    fn put_at(&self, at: &mut Value, key: &str) {
        let (first, rest) = match key.split_once('.') {
            Some((first, rest)) => (first, Some(rest)),
            None => (key, None),
        };
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
        // Anything but a map is reported by the schema.
        if let Some(map) = at.as_object_mut() {
            let value = map.entry(first).or_insert(Value::Null);
            match rest {
                Some(rest) => self.put_at(value, rest),
                None => *value = self.value.clone(),
            }
        }
    }

    /// Whether the value at a key path is this layer's.
    pub(super) fn reaches(&self, path: &str) -> bool {
        if self.setting.effect != Effect::Key {
            return false;
        }
        let in_pool = path
            .strip_prefix("pools[")
            .and_then(|p| Some(p.split_once("].")?.1));
        path == self.setting.key || (self.setting.pool && in_pool == Some(self.setting.key))
    }
}

/// A setting that is taken and does nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Its variable, or its flag with dashes.
    pub name: String,
    /// Why it does nothing.
    pub why: &'static str,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} does nothing: {}", self.name, self.why)
    }
}

/// YAML as a tree; an empty document is an empty map.
pub(super) fn parse(text: &str) -> Result<Value, ConfigErrors> {
    let syntax = |why: String| ConfigErrors::from(Problem::Syntax { why });
    let root: Value = serde_saphyr::from_str(text).map_err(|e| syntax(e.to_string()))?;
    match root {
        Value::Null => Ok(Value::Object(Map::new())),
        Value::Object(_) => Ok(root),
        _ => Err(syntax("the document is not a map".into())),
    }
}

/// Moves a pool's keys from the top level into the one pool they describe.
pub(super) fn to_long_form(root: &mut Value) -> Vec<Problem> {
    let Some(map) = root.as_object_mut() else {
        return Vec::new();
    };
    let found = pool_keys()
        .filter_map(|key| map.remove_entry(key))
        .collect::<Map<_, _>>();
    if map.contains_key("pools") {
        let misplaced = |(key, value): (&String, &Value)| {
            Problem::value(key, value, "belongs into a pool when there are `pools`")
        };
        return found.iter().map(misplaced).collect();
    }
    map.insert("pools".into(), Value::Array(vec![Value::Object(found)]));
    Vec::new()
}
