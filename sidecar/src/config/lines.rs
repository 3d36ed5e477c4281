//! On which line of a file each key stands.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// Lines by key path; empty for a text that is no YAML.
pub(super) fn lines(text: &str) -> BTreeMap<String, u64> {
    let mut lines = BTreeMap::new();
    if let Ok(node) = serde_saphyr::from_str::<Node>(text) {
        node.enter("", &mut lines);
    }
    lines
}

/// YAML with the lines of what it holds.
enum Node {
    Map(Vec<(String, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Scalar,
}

impl Node {
    fn enter(&self, at: &str, lines: &mut BTreeMap<String, u64>) {
        let mut below = |path: String, node: &Spanned<Node>| {
            lines.insert(path.clone(), node.referenced.line());
            node.value.enter(&path, lines);
        };
        match self {
            Self::Map(entries) if at.is_empty() => {
                for (key, node) in entries {
                    below(key.clone(), node);
                }
            }
            Self::Map(entries) => {
                for (key, node) in entries {
                    below(format!("{at}.{key}"), node);
                }
            }
            Self::List(nodes) => {
                for (i, node) in nodes.iter().enumerate() {
                    below(format!("{at}[{i}]"), node);
                }
            }
            Self::Scalar => {}
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}

struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = list.next_element()? {
            nodes.push(node);
        }
        Ok(Node::List(nodes))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_the_line_of_its_value() {
        let text = "a: 1\nlist:\n  - {b: true}\n  -\n    c: text\nnothing:\n";
        let lines = lines(text);
        let expected = [
            ("a", 1),
            ("list", 3),
            ("list[0]", 3),
            ("list[0].b", 3),
            ("list[1]", 5),
            ("list[1].c", 5),
            ("nothing", 6),
        ];
        let expected = expected.map(|(path, line)| (path.to_owned(), line));
        assert_eq!(lines.into_iter().collect::<Vec<_>>(), expected);
    }
}
