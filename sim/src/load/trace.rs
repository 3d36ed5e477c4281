//! Replay of traces in Mooncake's schema.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::workload::{CONTENT, Item, tokens};
use crate::rng::{Rng, mix};

/// Tokens that one hash id stands for.
const BLOCK: usize = 512;

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not of the schema.
    #[error("{}:{line}: {source}", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A line names fewer blocks than its prompt has.
    #[error("{}:{line}: {ids} hash ids do not cover {tokens} tokens", file.display())]
    Uncovered {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Hash ids of the line.
        ids: usize,
        /// Its `input_length`.
        tokens: usize,
    },
    /// No line at all.
    #[error("{} has no requests", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
}

/// The requests of a trace.
#[derive(Debug)]
pub(super) struct Trace(Vec<Row>);

#[derive(Debug, Deserialize)]
struct Row {
    /// Milliseconds.
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u64>,
}

impl Trace {
    /// The first `limit` requests of a file.
    pub(super) fn read(file: &Path, limit: usize) -> Result<Self, TraceError> {
        let read = |source| TraceError::Read {
            file: file.to_owned(),
            source,
        };
        let lines = BufReader::new(File::open(file).map_err(read)?).lines();
        let mut rows = Vec::new();
        for (line, text) in (1..).zip(lines) {
            let text = text.map_err(read)?;
            if rows.len() == limit {
                break;
            }
            if text.trim().is_empty() {
                continue;
            }
            let row: Row = serde_json::from_str(&text).map_err(|source| TraceError::Line {
                file: file.to_owned(),
                line,
                source,
            })?;
            if row.hash_ids.len() * BLOCK < row.input_length || row.input_length == 0 {
                return Err(TraceError::Uncovered {
                    file: file.to_owned(),
                    line,
                    ids: row.hash_ids.len(),
                    tokens: row.input_length,
                });
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(TraceError::Empty {
                file: file.to_owned(),
            });
        }
        Ok(Self(rows))
    }

    /// Its requests: every hash id becomes the same tokens wherever it stands.
    pub(super) fn items(
        self,
        seed: u64,
        speed: f64,
        length_scale: f64,
    ) -> impl Iterator<Item = Item> + Send {
        let scaled = move |length: usize| ((length as f64 * length_scale).round() as usize).max(1);
        let block = scaled(BLOCK);
        self.0.into_iter().map(move |row| {
            let length = scaled(row.input_length);
            let mut prompt = Vec::with_capacity(length);
            for id in row.hash_ids {
                let room = block.min(length - prompt.len());
                let mut content = Rng::new(mix(seed ^ mix(id)), CONTENT);
                prompt.extend(tokens(&mut content, room as u64));
            }
            Item {
                due: row.timestamp / 1_000.0 / speed,
                prompt,
                max_tokens: scaled(row.output_length),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn trace(text: &str, name: &str) -> Result<Trace, TraceError> {
        let file = std::env::temp_dir().join(format!("kv-sim-{}-{name}", std::process::id()));
        File::create(&file)
            .and_then(|mut out| out.write_all(text.as_bytes()))
            .expect("temporary file");
        let trace = Trace::read(&file, 10);
        std::fs::remove_file(&file).expect("temporary file");
        trace
    }

    const TWO: &str = r#"
{"timestamp": 0, "input_length": 1000, "output_length": 3, "hash_ids": [1, 2]}
{"timestamp": 3000, "input_length": 700, "output_length": 40, "hash_ids": [1, 3]}
"#;

    #[test]
    fn equal_ids_give_equal_tokens_and_the_last_block_is_partial() {
        let items: Vec<Item> = trace(TWO, "equal").unwrap().items(1, 10.0, 1.0).collect();
        assert_eq!(items[0].prompt.len(), 1_000);
        assert_eq!(items[1].prompt.len(), 700);
        assert_eq!(items[0].prompt[..512], items[1].prompt[..512]);
        assert_ne!(items[0].prompt[512..516], items[1].prompt[512..516]);
        assert!((items[1].due - 0.3).abs() < 1e-9);
        assert_eq!(items[1].max_tokens, 40);
    }

    #[test]
    fn lengths_scale_and_stay_shared() {
        let items: Vec<Item> = trace(TWO, "scaled").unwrap().items(1, 1.0, 0.125).collect();
        assert_eq!(items[0].prompt.len(), 125);
        assert_eq!(items[0].prompt[..64], items[1].prompt[..64]);
        assert_ne!(items[0].prompt[64..68], items[1].prompt[64..68]);
        assert_eq!(items[0].max_tokens, 1);
    }

    #[test]
    fn bad_lines_are_named() {
        let error = |text, name| trace(text, name).expect_err(name).to_string();
        let short = r#"{"timestamp":0,"input_length":513,"output_length":1,"hash_ids":[1]}"#;
        assert!(error(short, "short").contains(":1: 1 hash ids do not cover 513 tokens"));
        assert!(error("\n{}", "fields").contains(":2: missing field"));
        assert!(error("\n", "empty").contains("has no requests"));
    }
}
