//! The agents workload: conversations under shared system prompts.

use std::collections::VecDeque;

use super::workload::{ARRIVALS, CONTENT, Item, SHAPES, SHARED, output_length, tokens};
use crate::rng::Rng;
use crate::token::Answer;

/// Shared system prompts.
const SYSTEM_PROMPTS: u64 = 48;

/// Conversations open at a time. The next turn is one of the half that has waited longest, so at
/// least half as many other requests lie between two turns.
const OPEN: usize = 64;

/// Turns of a conversation: 1 to this.
const TURNS: u64 = 8;

/// Requests of the workload, without end.
pub(super) struct Agents {
    system_prompts: Vec<Vec<u32>>,
    open: VecDeque<Conversation>,
    arrivals: Rng,
    shapes: Rng,
    content: Rng,
    due: f64,
}

struct Conversation {
    history: Vec<u32>,
    turns_left: u64,
}

impl Agents {
    pub(super) fn new(seed: u64) -> Self {
        let mut shared = Rng::new(seed, SHARED);
        let system_prompts = (0..SYSTEM_PROMPTS)
            .map(|_| {
                let length = shared.within(2_300, 2_700);
                tokens(&mut shared, length).collect()
            })
            .collect();
        let mut agents = Self {
            system_prompts,
            open: VecDeque::new(),
            arrivals: Rng::new(seed, ARRIVALS),
            shapes: Rng::new(seed, SHAPES),
            content: Rng::new(seed, CONTENT),
            due: 0.0,
        };
        for _ in 0..OPEN {
            let conversation = agents.start();
            agents.open.push_back(conversation);
        }
        agents
    }

    fn start(&mut self) -> Conversation {
        let system = self.shapes.within(0, SYSTEM_PROMPTS - 1);
        let system = usize::try_from(system).unwrap_or(0);
        Conversation {
            history: self.system_prompts[system].clone(),
            turns_left: self.shapes.within(1, TURNS),
        }
    }
}

impl Iterator for Agents {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.due += self.arrivals.exponential();
        let half = self.open.len() as u64 / 2;
        let pick = usize::try_from(self.shapes.within(0, half - 1)).unwrap_or(0);
        let mut conversation = self.open.remove(pick)?;
        let question = self.shapes.within(120, 316);
        conversation
            .history
            .extend(tokens(&mut self.content, question));
        let prompt = conversation.history.clone();
        let max_tokens = output_length(&mut self.shapes);
        let answer = Answer::to(&prompt);
        conversation
            .history
            .extend((0..max_tokens).map(|position| answer.token(position)));
        conversation.turns_left -= 1;
        if conversation.turns_left == 0 {
            conversation = self.start();
        }
        self.open.push_back(conversation);
        Some(Item {
            due: self.due,
            prompt,
            max_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use kv_core::hash::Seed;

    use super::*;
    use crate::chain::Chain;

    /// Names of the full blocks of a sequence.
    fn blocks(tokens: &[u32]) -> Vec<u64> {
        let mut chain = Chain::new(1, 16, Seed::new("", ""));
        chain.extend(tokens);
        chain.keys().iter().map(|key| key.engine_hash).collect()
    }

    #[test]
    fn shape_is_as_documented() {
        let items: Vec<Item> = Agents::new(1).take(1_500).collect();
        let prompt_tokens: usize = items.iter().map(|item| item.prompt.len()).sum();
        let mean = prompt_tokens / items.len();
        assert!((3_100..3_500).contains(&mean), "{mean} prompt tokens");
        let outputs: usize = items.iter().map(|item| item.max_tokens).sum();
        assert!((38..=42).contains(&(outputs / items.len())));
        let systems: HashSet<&[u32]> = items.iter().map(|item| &item.prompt[..64]).collect();
        assert_eq!(systems.len(), 48);
    }

    #[test]
    fn an_endless_cache_would_hit_nine_tenths() {
        let (mut seen, mut hits, mut all) = (HashSet::new(), 0, 0);
        for item in Agents::new(1).take(1_500) {
            let answer = Answer::to(&item.prompt);
            let mut sequence = item.prompt.clone();
            sequence.extend((0..item.max_tokens - 1).map(|at| answer.token(at)));
            let known = blocks(&item.prompt)
                .iter()
                .take_while(|&block| seen.contains(block))
                .count();
            seen.extend(blocks(&sequence));
            hits += known * 16;
            all += item.prompt.len();
        }
        let share = hits as f64 / all as f64;
        assert!((0.88..0.93).contains(&share), "{share}");
    }

    #[test]
    fn half_of_the_open_conversations_lie_between_two_turns() {
        let items: Vec<Item> = Agents::new(1).take(400).collect();
        for (at, item) in items.iter().enumerate() {
            let next = items[at + 1..]
                .iter()
                .position(|later| later.prompt.starts_with(&item.prompt));
            assert!(next.is_none_or(|gap| gap + 1 >= OPEN / 2), "{next:?}");
        }
    }
}
