//! What is wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

use super::layer::{Layer, Origin};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The file can't be read.
    #[error("{}: {why}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system says.
        why: String,
    },
    /// The text is no YAML.
    #[error("not valid YAML: {why}")]
    Syntax {
        /// What the parser says, with line and column.
        why: String,
    },
    /// A value that isn't allowed.
    #[error("{path}: {why}, got {value}")]
    Value {
        /// Key path, such as `workers[2].endpoint`.
        path: String,
        /// The offending value.
        value: String,
        /// What would be right.
        why: String,
    },
    /// A key that isn't known.
    #[error("{path}: unknown key, value {value}")]
    UnknownKey {
        /// Key path.
        path: String,
        /// Its value.
        value: String,
    },
    /// A variable or a flag that isn't taken.
    #[error("{name}: {why}, got {value}")]
    Setting {
        /// The variable, or the flag with dashes.
        name: String,
        /// Its value.
        value: String,
        /// What stands in its place.
        why: String,
    },
    /// A key that must be there.
    #[error("{path}: missing")]
    Missing {
        /// Key path.
        path: String,
    },
}

impl Problem {
    pub(super) fn value(path: impl Into<String>, value: impl fmt::Display, why: &str) -> Self {
        Self::Value {
            path: path.into(),
            value: value.to_string(),
            why: why.into(),
        }
    }

    /// The same for a worker by itself.
    pub(super) fn of_worker(mut self) -> Self {
        if let Self::Value { path, .. } | Self::UnknownKey { path, .. } | Self::Missing { path } =
            &mut self
            && let Some(rest) = path.strip_prefix("pools[0].workers[0].")
        {
            *path = rest.to_owned();
        }
        self
    }

    pub(super) fn path(&self) -> Option<&str> {
        match self {
            Self::Unreadable { .. } | Self::Syntax { .. } | Self::Setting { .. } => None,
            Self::Value { path, .. } | Self::UnknownKey { path, .. } | Self::Missing { path } => {
                Some(path)
            }
        }
    }
}

/// Everything that is wrong with a configuration; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<(Problem, Option<Origin>)>);

impl ConfigErrors {
    pub(super) fn new(problems: Vec<Problem>, layers: &[Layer]) -> Self {
        let origin = |p: &Problem| {
            let path = p.path()?;
            let layer = layers.iter().rev().find(|l| l.reaches(path))?;
            Some(layer.origin.clone())
        };
        let with_origin = problems.into_iter().map(|p| {
            let origin = origin(&p);
            (p, origin)
        });
        Self(with_origin.collect())
    }

    /// What is wrong.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter().map(|(problem, _)| problem)
    }
}

impl From<Problem> for ConfigErrors {
    fn from(problem: Problem) -> Self {
        Self(vec![(problem, None)])
    }
}

impl fmt::Display for ConfigErrors {
    /// One line to a problem.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (problem, origin)) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            match origin {
                Some(origin) => write!(f, "{problem} (from {origin})")?,
                None => write!(f, "{problem}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
