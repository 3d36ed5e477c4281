//! The JSON Schema of the file, and what it refuses.

use std::fmt::Write as _;
use std::sync::LazyLock;

use jsonschema::error::ValidationErrorKind;
use jsonschema::paths::{Location, LocationSegment};
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::error::Problem;
use super::file::File;

static SCHEMA: LazyLock<Value> = LazyLock::new(generate);

/// The JSON Schema (draft 2020-12) of the file: a pool's keys may stand at the top level.
#[must_use]
pub fn schema() -> &'static Value {
    &SCHEMA
}

fn generate() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<File>().to_value();
    let pool = schema
        .pointer("/$defs/Pool/properties")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for (key, value) in pool {
            if key != "name" {
                properties.insert(key, value);
            }
        }
        // Absent is allowed, empty is not: no default to suggest.
        if let Some(pools) = properties.get_mut("pools").and_then(Value::as_object_mut) {
            pools.remove("default");
        }
    }
    schema
}

/// Keys of a pool that the short form has at the top level.
pub(super) fn pool_keys() -> impl Iterator<Item = &'static String> {
    let properties = SCHEMA
        .pointer("/$defs/Pool/properties")
        .and_then(Value::as_object);
    let keys = properties.into_iter().flat_map(serde_json::Map::keys);
    keys.filter(|key| *key != "name")
}

/// Says what the schema refuses and cuts it away.
pub(super) fn prune(root: &mut Value) -> Vec<Problem> {
    let validator = match jsonschema::validator_for(schema()) {
        Ok(validator) => validator,
        Err(e) => return vec![Problem::Syntax { why: e.to_string() }],
    };
    let mut problems = Vec::new();
    let mut cut = Vec::new();
    for error in validator.iter_errors(root) {
        let at = error.instance_path();
        match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                for key in unexpected {
                    let value = error.instance().get(key).cloned().unwrap_or_default();
                    problems.push(Problem::UnknownKey {
                        path: join(&path(at), key),
                        value: value.to_string(),
                    });
                    cut.push(at.join(key.as_str()));
                }
            }
            ValidationErrorKind::Required { property } => {
                let key = property.as_str().unwrap_or_default();
                problems.push(Problem::Missing {
                    path: join(&path(at), key),
                });
            }
            _ => {
                let value = error.instance().to_string();
                problems.push(Problem::value(path(at), value, &expectation(&error)));
                cut.push(at.clone());
            }
        }
    }
    // The last element of a list first, so that the positions of the others stay true.
    cut.sort_by_key(|at| std::cmp::Reverse(order(at)));
    cut.dedup();
    for at in cut {
        remove(root, &at);
    }
    problems
}

/// What would be right, in the words of the schema.
fn expectation(error: &jsonschema::ValidationError<'_>) -> String {
    let rule = schema().pointer(error.schema_path().as_str());
    match (error.kind(), rule) {
        (ValidationErrorKind::OneOfNotValid { .. }, Some(Value::Array(options))) => {
            let names = options.iter().filter_map(|o| o.get("const")?.as_str());
            format!("must be one of {}", names.collect::<Vec<_>>().join(", "))
        }
        (ValidationErrorKind::Type { .. }, Some(rule)) => format!("must be of type {rule}"),
        (ValidationErrorKind::Minimum { limit }, _) => format!("must be at least {limit}"),
        (ValidationErrorKind::Maximum { limit }, _) => format!("must be at most {limit}"),
        (ValidationErrorKind::Pattern { pattern }, _) => format!("must match {pattern}"),
        (kind, rule) => match rule {
            Some(rule) => format!("must keep to {} {rule}", kind.keyword()),
            None => format!("must keep to {}", kind.keyword()),
        },
    }
}

/// `workers[2].endpoint`; the document itself is `document`.
fn path(at: &Location) -> String {
    let mut path = String::new();
    for segment in at {
        match segment {
            LocationSegment::Property(key) => path = join(&path, &key),
            LocationSegment::Index(i) => {
                // Writing to a string cannot fail.
                let _ = write!(path, "[{i}]");
            }
        }
    }
    path
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Sorts a location after those it contains and list elements by position.
fn order(at: &Location) -> Vec<(usize, String)> {
    let part = |segment| match segment {
        LocationSegment::Property(key) => (0, key.into_owned()),
        LocationSegment::Index(i) => (i, String::new()),
    };
    at.into_iter().map(part).collect()
}

fn remove(root: &mut Value, at: &Location) {
    let pointer = at.as_str();
    let Some((parent, _)) = pointer.rsplit_once('/') else {
        *root = Value::Object(serde_json::Map::new());
        return;
    };
    let last = at.into_iter().last();
    match (root.pointer_mut(parent), last) {
        (Some(Value::Object(map)), Some(LocationSegment::Property(key))) => {
            map.remove(key.as_ref());
        }
        (Some(Value::Array(list)), Some(LocationSegment::Index(i))) if i < list.len() => {
            list.remove(i);
        }
        // A container of it has been cut away already.
        _ => {}
    }
}
