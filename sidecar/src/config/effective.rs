//! What every key comes to and who says so.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::layer::{Layer, Note, Origin};
use super::lines::lines;
use super::restart::{Restart, restart};
use super::schema::schema;
use super::{Config, ConfigErrors, Pool, compat};

/// A configuration, key by key.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Effective {
    /// The file.
    pub file: PathBuf,
    /// Its keys, in the file's order; those of a pool as they stand in the short form, where it is
    /// the only one.
    pub keys: Vec<Key>,
    /// Settings that do nothing.
    pub notes: Vec<Note>,
}

/// A key.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Key {
    /// Its path.
    pub key: String,
    /// Its value; null where there is none.
    pub value: Value,
    /// Who says so.
    pub from: From,
    /// Who says something else and is overruled, the most important first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub over: Vec<From>,
    /// What has to be restarted when it changes; nothing for most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
    /// Why it isn't taken over by a running sidecar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
}

/// Who gives a key its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum From {
    /// A variable or a flag.
    Layer(Origin),
    /// The file, on this line.
    File(u64),
    /// Another key, whoever set that.
    Key(&'static str),
    /// What the key `compat` stands for.
    Compat,
    /// Nobody.
    Default,
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(origin) => write!(f, "{origin}"),
            Self::File(line) => write!(f, "line {line}"),
            Self::Key(key) => write!(f, "key {key}"),
            Self::Compat => f.write_str("compat"),
            Self::Default => f.write_str("default"),
        }
    }
}

impl Serialize for From {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Effective {
    /// Reads a file and puts the layers over it, as [`Config::load`] does.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(file: &Path, layers: &[Layer]) -> Result<Self, ConfigErrors> {
        let text = super::read(file)?;
        Ok(Self {
            file: file.into(),
            ..Self::parse(&text, layers)?
        })
    }

    /// Reads YAML text and puts the layers over it.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn parse(text: &str, layers: &[Layer]) -> Result<Self, ConfigErrors> {
        let config = Config::parse(text, layers)?;
        let mut tree = serde_json::to_value(&config.file).unwrap_or_default();
        let sources = Sources {
            lines: lines(text),
            layers,
            is_short: config.file.is_short(),
            is_compatible: tree["compat"].is_string(),
        };
        let mut inherited = BTreeMap::new();
        fill(&mut tree, schema());
        for (i, pool) in config.pools.iter().enumerate() {
            let Some(map) = tree.pointer_mut(&format!("/pools/{i}")) else {
                continue;
            };
            fill(map, pool_schema());
            for (key, value, by) in resolved(pool, map) {
                map[key] = value;
                if let Some(by) = by {
                    inherited.insert(format!("pools[{i}].{key}"), by);
                }
            }
        }
        let mut keys = Vec::new();
        let mut leaves = Vec::new();
        flatten(&tree, "", &mut leaves);
        for (path, value) in leaves {
            let (from, over) = sources.of(&path, inherited.get(&path).copied());
            let (restart, why) = restart(&path).unzip();
            keys.push(Key {
                key: sources.shown(&path).to_owned(),
                value: without_secrets(&path, value),
                from,
                over,
                restart,
                why,
            });
        }
        Ok(Self {
            file: PathBuf::new(),
            keys,
            notes: layers.iter().filter_map(Layer::note).collect(),
        })
    }
}

/// What pools' keys come to that have no default in the file, and by which other key.
fn resolved(pool: &Pool, map: &Value) -> Vec<(&'static str, Value, Option<&'static str>)> {
    let policy = &pool.policy;
    let values = [
        ("prefill_load_scale", Value::from(policy.prefill_load_scale)),
        (
            "overlap_score_credit",
            Value::from(policy.overlap_score_credit),
        ),
    ];
    let is_weighted = !map["kv_overlap_score_weight"].is_null();
    let unset = values.into_iter().filter(|(key, _)| map[*key].is_null());
    unset
        .map(|(key, value)| (key, value, is_weighted.then_some("kv_overlap_score_weight")))
        .collect()
}

fn pool_schema() -> &'static Value {
    schema().pointer("/$defs/Pool").unwrap_or(&Value::Null)
}

/// Puts null for the keys of a schema that are not there, but for those of pools.
fn fill(tree: &mut Value, schema: &Value) {
    let is_pool = std::ptr::eq(schema, pool_schema());
    let of_pools = pool_schema()["properties"].as_object();
    let properties = schema["properties"].as_object().into_iter().flatten();
    for (key, _) in properties {
        let is_pools = of_pools.is_some_and(|keys| keys.contains_key(key));
        if let Some(map) = tree.as_object_mut()
            && (is_pool || !is_pools)
        {
            map.entry(key).or_insert(Value::Null);
        }
    }
}

/// Paths of everything that holds nothing further.
fn flatten<'t>(node: &'t Value, at: &str, leaves: &mut Vec<(String, &'t Value)>) {
    match node {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                let path = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                flatten(value, &path, leaves);
            }
        }
        // Lists of names are values.
        Value::Array(list) if list.iter().any(Value::is_object) => {
            for (i, value) in list.iter().enumerate() {
                flatten(value, &format!("{at}[{i}]"), leaves);
            }
        }
        _ => leaves.push((at.to_owned(), node)),
    }
}

/// A URL may hold a password.
fn without_secrets(path: &str, value: &Value) -> Value {
    match value {
        Value::String(text) if path == "nats.url" => {
            let bare = |url: &str| match (url.split_once("://"), url.rsplit_once('@')) {
                (Some((scheme, _)), Some((_, host))) => format!("{scheme}://***@{host}"),
                (None, Some((_, host))) => format!("***@{host}"),
                _ => url.to_owned(),
            };
            text.split(',')
                .map(bare)
                .collect::<Vec<_>>()
                .join(",")
                .into()
        }
        other => other.clone(),
    }
}

/// Where values come from.
struct Sources<'a> {
    lines: BTreeMap<String, u64>,
    layers: &'a [Layer],
    is_short: bool,
    is_compatible: bool,
}

impl Sources<'_> {
    /// A path as the file has it, or would have it.
    fn shown<'p>(&self, path: &'p str) -> &'p str {
        match path.strip_prefix("pools[0].") {
            Some(key) if self.is_short => key,
            _ => path,
        }
    }

    /// Who gives a key its value, and who is overruled.
    fn of(&self, path: &str, by: Option<&'static str>) -> (From, Vec<From>) {
        let shown = self.shown(path);
        let set = self
            .layers
            .iter()
            .rev()
            .filter(|layer| layer.reaches(shown));
        let mut all: Vec<From> = set.map(|layer| From::Layer(layer.origin.clone())).collect();
        let line = self.lines.get(shown).or_else(|| self.lines.get(path));
        all.extend(line.map(|line| From::File(*line)));
        all.extend(by.map(From::Key));
        let is_default = || {
            let key = path.split_once("].").map_or(path, |(_, key)| key);
            self.is_compatible && compat::defaults().any(|(name, _)| name == key)
        };
        let last = if is_default() {
            From::Compat
        } else {
            From::Default
        };
        if all.is_empty() {
            return (last, Vec::new());
        }
        let first = all.remove(0);
        (first, all)
    }
}

impl fmt::Display for Effective {
    /// A table, and what else there is to say below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["KEY", "VALUE", "FROM", "A CHANGE RESTARTS"].map(str::to_owned)];
        for key in &self.keys {
            let value = match &key.value {
                Value::String(text) if !text.is_empty() => text.clone(),
                Value::Null => "none".to_owned(),
                other => other.to_string(),
            };
            let mut from = key.from.to_string();
            if !key.over.is_empty() {
                let over: Vec<String> = key.over.iter().map(ToString::to_string).collect();
                from = format!("{from}, over {}", over.join(", "));
            }
            let restart = match (key.restart, key.why) {
                (Some(restart), Some(why)) => format!("{}: {why}", restart.name()),
                _ => String::new(),
            };
            rows.push([key.key.clone(), value, from, restart]);
        }
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or_default()
        };
        let widths = [0, 1, 2].map(width);
        for [key, value, from, restart] in &rows {
            let [of_key, of_value, of_from] = widths;
            let line = format!("{key:of_key$}  {value:of_value$}  {from:of_from$}  {restart}");
            writeln!(f, "{}", line.trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        Ok(())
    }
}
