//! Two fleets that hold the same and differ in how they choose a worker.

use std::net::SocketAddr;

use kv_core::rng::Rng;

use crate::corpus::Corpus;
use crate::feed::Feed;
use crate::fleet::{Fleet, Options};
use crate::prompt::{Case, Prompt};

/// A fleet for each mode, without decision records in the answers.
#[derive(Debug)]
pub struct Modes {
    /// Workers in turn.
    pub round_robin: Fleet,
    /// By what the workers hold.
    pub kv: Fleet,
}

/// Prompts of `tokens` token ids, each held in full by one of the workers `1..=workers`.
#[must_use]
pub fn prompts(tokens: usize, workers: usize) -> Vec<Prompt> {
    let mut rng = Rng::new(4);
    (0..16)
        .map(|_| Prompt::new(Case::Full, tokens, workers, &mut rng))
        .collect()
}

impl Modes {
    /// Starts both over these workers, with `blocks` blocks of conversations and what the prompts
    /// need in their index.
    ///
    /// # Errors
    /// When a fleet doesn't start or doesn't take the blocks.
    pub async fn start(
        workers: &[SocketAddr],
        blocks: usize,
        prompts: &[Prompt],
    ) -> anyhow::Result<Self> {
        let start = async |mode| {
            let options = Options {
                workers,
                mode,
                decision_header: false,
                tokenizer: None,
            };
            let fleet = Fleet::start(options).await?;
            let mut feed = Feed::connect(&fleet, 1).await?;
            for conversation in Corpus::new(workers.len(), 1).of_size(blocks) {
                feed.add(&fleet, conversation.stores).await?;
            }
            feed.add(&fleet, prompts.iter().flat_map(|p| p.stores.clone()))
                .await?;
            feed.finish(&fleet).await?;
            anyhow::Ok(fleet)
        };
        Ok(Self {
            round_robin: start("round-robin").await?,
            kv: start("kv").await?,
        })
    }
}
