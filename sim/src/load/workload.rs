//! What is asked, in which order, and when: a function of the seed alone.
//!
//! Nothing here depends on what a server answers or how fast it is. The answers a conversation
//! continues from are those of [`crate::token::Answer`].

use std::path::PathBuf;

use super::agents::Agents;
use super::trace::{Trace, TraceError};
use crate::rng::Rng;
use crate::token::from_number;

/// Requests of one burst, and prefixes they share.
const BURST: usize = 64;
const BURST_PREFIXES: u64 = 24;

/// Streams of the seed, one per use, so that no use disturbs another.
pub(super) const ARRIVALS: u64 = 1;
pub(super) const SHAPES: u64 = 2;
pub(super) const CONTENT: u64 = 3;
pub(super) const SHARED: u64 = 4;

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// When it is due: seconds after the start for a trace, and for generated workloads seconds at
    /// one request a second, to be divided by the rate.
    pub due: f64,
    /// Its prompt.
    pub prompt: Vec<u32>,
    /// Output tokens asked for.
    pub max_tokens: usize,
}

/// Which workload.
#[derive(Clone, Debug, PartialEq)]
pub enum Workload {
    /// 48 system prompts of about 2,500 tokens shared by multi-turn conversations: about 3,300
    /// prompt tokens and 40 output tokens a request, nine tenths of them seen before.
    Agents,
    /// Prompts that share nothing: 1,000 to 3,000 tokens.
    Unique,
    /// 64 requests at the same instant, over 24 prefixes of 2,000 tokens.
    Burst,
    /// A trace in Mooncake's schema.
    Trace {
        /// One JSON object per line.
        file: PathBuf,
        /// Factor on the trace's time; 2 replays twice as fast.
        speed: f64,
        /// Factor on all lengths.
        length_scale: f64,
    },
}

impl Workload {
    /// Its name in reports.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Agents => "agents".to_owned(),
            Self::Unique => "unique".to_owned(),
            Self::Burst => "burst".to_owned(),
            Self::Trace { file, .. } => file
                .file_name()
                .map_or_else(|| "trace".into(), |name| name.to_string_lossy())
                .into_owned(),
        }
    }

    /// The first `count` requests.
    ///
    /// # Errors
    ///
    /// A trace that cannot be read.
    pub fn items(
        &self,
        seed: u64,
        count: usize,
    ) -> Result<Box<dyn Iterator<Item = Item> + Send>, TraceError> {
        Ok(match self {
            Self::Agents => Box::new(Agents::new(seed).take(count)),
            Self::Unique => Box::new(unique(seed).take(count)),
            Self::Burst => Box::new(burst(seed).take(count)),
            Self::Trace {
                file,
                speed,
                length_scale,
            } => Box::new(Trace::read(file, count)?.items(seed, *speed, *length_scale)),
        })
    }
}

/// Tokens of one independent stream.
pub(super) fn tokens(rng: &mut Rng, count: u64) -> impl Iterator<Item = u32> + '_ {
    (0..count).map(|_| from_number(rng.bits()))
}

/// The same requests, at one a second on average instead of at their own times.
pub(super) fn with_poisson_arrivals(
    items: impl Iterator<Item = Item>,
    seed: u64,
) -> impl Iterator<Item = Item> {
    let mut arrivals = Rng::new(seed, ARRIVALS);
    let mut due = 0.0;
    items.map(move |item| {
        due += arrivals.exponential();
        Item { due, ..item }
    })
}

fn unique(seed: u64) -> impl Iterator<Item = Item> {
    let mut arrivals = Rng::new(seed, ARRIVALS);
    let mut shapes = Rng::new(seed, SHAPES);
    let mut content = Rng::new(seed, CONTENT);
    let mut due = 0.0;
    std::iter::repeat_with(move || {
        due += arrivals.exponential();
        let length = shapes.within(1_000, 3_000);
        Item {
            due,
            prompt: tokens(&mut content, length).collect(),
            max_tokens: output_length(&mut shapes),
        }
    })
}

fn burst(seed: u64) -> impl Iterator<Item = Item> {
    let mut shared = Rng::new(seed, SHARED);
    let prefixes: Vec<Vec<u32>> = (0..BURST_PREFIXES)
        .map(|_| tokens(&mut shared, 2_000).collect())
        .collect();
    let mut shapes = Rng::new(seed, SHAPES);
    let mut content = Rng::new(seed, CONTENT);
    (0..).map(move |at: usize| {
        let prefix = usize::try_from(shapes.within(0, BURST_PREFIXES - 1)).unwrap_or(0);
        let mut prompt = prefixes[prefix].clone();
        prompt.extend(tokens(&mut content, shapes.within(64, 256)));
        Item {
            due: (at / BURST * BURST) as f64,
            prompt,
            max_tokens: output_length(&mut shapes),
        }
    })
}

/// Output tokens: 20 to 60.
pub(super) fn output_length(shapes: &mut Rng) -> usize {
    usize::try_from(shapes.within(20, 60)).unwrap_or(20)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn items(workload: &Workload, seed: u64, count: usize) -> Vec<Item> {
        workload.items(seed, count).expect("generated").collect()
    }

    #[test]
    fn a_seed_gives_the_same_items_and_another_gives_others() {
        for workload in [Workload::Agents, Workload::Unique, Workload::Burst] {
            let first = items(&workload, 1, 40);
            assert_eq!(first, items(&workload, 1, 40), "{workload:?}");
            assert_ne!(first, items(&workload, 2, 40), "{workload:?}");
            assert_eq!(first[..20], items(&workload, 1, 20), "{workload:?}");
        }
    }

    #[test]
    fn unique_prompts_share_no_first_block() {
        let firsts: HashSet<_> = items(&Workload::Unique, 1, 100)
            .into_iter()
            .map(|item| item.prompt[..16].to_vec())
            .collect();
        assert_eq!(firsts.len(), 100);
    }

    #[test]
    fn a_burst_is_64_at_once_over_24_prefixes() {
        let items = items(&Workload::Burst, 1, 256);
        let at_start = items.iter().filter(|item| item.due == 0.0).count();
        assert_eq!(at_start, 64);
        let prefixes: HashSet<_> = items.iter().map(|item| &item.prompt[..2_000]).collect();
        assert_eq!(prefixes.len(), 24);
    }

    #[test]
    fn arrivals_come_at_one_a_second_before_the_rate_is_applied() {
        let last = items(&Workload::Unique, 1, 2_000).pop().expect("items").due;
        assert!((1_800.0..2_200.0).contains(&last), "{last}");
    }
}
