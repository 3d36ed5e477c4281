//! The classes of a pool, and which of them a request belongs to.

use serde::{Deserialize, Serialize};

use super::class::Class;

/// Classes of a pool, at most: what is told about them fits into 64 bits.
pub const MAX_CLASSES: usize = 64;

/// The classes of a pool.
///
/// Some stand in a matrix of families, which clients name, and buckets by the number of prompt
/// tokens to compute; the others are named themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    classes: Vec<Class>,
    /// Families; the first is that of requests that name no class or an unknown one.
    families: Vec<String>,
    /// Least tokens of each bucket, ascending from 0.
    buckets: Vec<u64>,
    /// Positions of classes, family by family, bucket by bucket.
    matrix: Vec<usize>,
    /// What holds for all requests that wait.
    pub bounds: Bounds,
}

/// Bounds for all requests of a pool that wait, in each filter VM unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// How long one may wait, milliseconds.
    pub wait_ms: u64,
    /// Requests.
    pub requests: u64,
    /// Their prompt tokens.
    pub tokens: u64,
    /// Their bodies, bytes.
    pub body_bytes: u64,
}

/// How requests are refused because of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusing {
    /// Their status, but for those that waited too long or have no worker.
    pub status: u16,
    /// What `retry-after` says, seconds.
    pub retry_after_s: u32,
}

impl Default for Refusing {
    fn default() -> Self {
        Self {
            status: 529,
            retry_after_s: 1,
        }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            wait_ms: 30_000,
            requests: 4_096,
            tokens: 64_000_000,
            body_bytes: 256 << 20,
        }
    }
}

/// A class and its place in the matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucketed {
    /// The class.
    pub class: Class,
    /// Its family and bucket; `None` for one that is named itself.
    pub at: Option<(String, String)>,
}

/// Classes that make no profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Not a number of classes that works.
    #[error("{0} classes, allowed are 1 to {MAX_CLASSES}")]
    Count(usize),
    /// Two classes of one name.
    #[error("class {0:?} stands there twice")]
    Twice(String),
    /// No class for a family and bucket.
    #[error("no class for family {0:?} and bucket {1:?}")]
    Missing(String, String),
    /// A bucket that is not in the list.
    #[error("class {0:?} is in bucket {1:?}, which is not one of uncached_isl_buckets")]
    NoBucket(String, String),
    /// A family that no class has.
    #[error("default_policy_family {0:?} is the family of no class")]
    NoFamily(String),
    /// Buckets that don't ascend from 0.
    #[error("uncached_isl_buckets must start at 0 tokens and increase")]
    Buckets,
}

impl Profile {
    /// One class for all.
    #[must_use]
    pub fn single(class: Class) -> Self {
        Self {
            families: vec![class.name.clone()],
            classes: vec![class],
            buckets: vec![0],
            matrix: vec![0],
            bounds: Bounds::default(),
        }
    }

    /// Classes in a matrix of families and `buckets`, given by their least tokens and names; requests
    /// that name no class are of the family `default`.
    ///
    /// # Errors
    /// When the matrix is not full or not clear.
    pub fn new(
        classes: Vec<Bucketed>,
        default: &str,
        buckets: &[(u64, String)],
    ) -> Result<Self, ProfileError> {
        if !(1..=MAX_CLASSES).contains(&classes.len()) {
            return Err(ProfileError::Count(classes.len()));
        }
        let starts = buckets.first().is_some_and(|(least, _)| *least == 0);
        if !starts || !buckets.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err(ProfileError::Buckets);
        }
        let mut families = vec![default.to_owned()];
        for (i, Bucketed { class, at }) in classes.iter().enumerate() {
            if classes.iter().take(i).any(|c| c.class.name == class.name) {
                return Err(ProfileError::Twice(class.name.clone()));
            }
            let Some((family, bucket)) = at else { continue };
            if !buckets.iter().any(|(_, name)| name == bucket) {
                return Err(ProfileError::NoBucket(class.name.clone(), bucket.clone()));
            }
            if !families.contains(family) {
                families.push(family.clone());
            }
        }
        let is_family = |c: &Bucketed| c.at.as_ref().is_some_and(|(f, _)| f == default);
        if !classes.iter().any(is_family) {
            return Err(ProfileError::NoFamily(default.to_owned()));
        }
        let mut matrix = Vec::new();
        for family in &families {
            for (_, bucket) in buckets {
                let is_it = |c: &Bucketed| {
                    let at = c.at.as_ref();
                    at.is_some_and(|(f, b)| f == family && b == bucket)
                };
                let mut found = (0..).zip(&classes).filter(|(_, c)| is_it(c));
                let (first, second) = (found.next(), found.next());
                let Some((at, _)) = first else {
                    return Err(ProfileError::Missing(family.clone(), bucket.clone()));
                };
                if let Some((_, other)) = second {
                    return Err(ProfileError::Twice(other.class.name.clone()));
                }
                matrix.push(at);
            }
        }
        Ok(Self {
            classes: classes.into_iter().map(|c| c.class).collect(),
            families,
            buckets: buckets.iter().map(|(least, _)| *least).collect(),
            matrix,
            bounds: Bounds::default(),
        })
    }

    /// The classes.
    #[must_use]
    pub fn classes(&self) -> &[Class] {
        &self.classes
    }

    /// The class of a request that names a class or family, empty for none, and has so many tokens to
    /// compute.
    #[must_use]
    pub fn class_of(&self, named: &str, uncached_tokens: u32) -> usize {
        let is_named = |at: &usize| {
            let class = self.classes.get(*at);
            class.is_some_and(|class| class.name == named)
        };
        let own = (0..self.classes.len()).find(is_named);
        if let Some(own) = own.filter(|own| !self.matrix.contains(own)) {
            return own;
        }
        let family = self.families.iter().position(|family| family == named);
        let bucket = self
            .buckets
            .partition_point(|least| *least <= uncached_tokens.into());
        let at = family.unwrap_or(0) * self.buckets.len() + bucket.saturating_sub(1);
        self.matrix.get(at).copied().unwrap_or(0)
    }

    /// Whether any class's requests ever wait.
    #[must_use]
    pub fn queues(&self) -> bool {
        self.classes.iter().any(Class::queues)
    }
}
