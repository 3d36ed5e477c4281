//! Merges of a byte pair encoding whose files tell tokens and ranks alone.
//!
//! Tiktoken and SentencePiece merge any two neighbours that make a token, the best rank first and
//! of those the leftmost; `tokenizers` merges the pairs of a list. A token that is about to be made
//! has better ranks nowhere within it, and nothing within it was merged with anything outside. So
//! its two parts are the same wherever it stands: those that its own text comes to with all better
//! ranks. With these pairs, in the order of the ranks, both come to the same.

use std::collections::HashMap;

/// The pair that each token of more than one character is made of, best rank first. Tokens that no
/// merge comes to have none. Lower ranks are better, and no two are the same.
pub(super) fn merges(ranks: &HashMap<&str, u32>) -> Vec<(String, String)> {
    let pair = |(token, rank): (&&str, &u32)| {
        let (left, right) = last_pair(ranks, token, *rank)?;
        Some((*rank, left.to_owned(), right.to_owned()))
    };
    let mut pairs: Vec<_> = ranks.iter().filter_map(pair).collect();
    pairs.sort_unstable_by_key(|(rank, ..)| *rank);
    let pairs = pairs.into_iter();
    pairs.map(|(_, left, right)| (left, right)).collect()
}

/// The two parts that a token's text comes to with the ranks better than its own.
fn last_pair<'t>(
    ranks: &HashMap<&str, u32>,
    token: &'t str,
    own: u32,
) -> Option<(&'t str, &'t str)> {
    let mut ends: Vec<usize> = token.char_indices().map(|(at, _)| at).collect();
    ends.push(token.len());
    loop {
        let better = |(i, w): (usize, &[usize])| {
            let &[from, _, to] = w else { return None };
            let rank = *ranks.get(token.get(from..to)?)?;
            (rank < own).then_some((rank, i + 1))
        };
        let best = ends.windows(3).enumerate().filter_map(better).min();
        let Some((_, between)) = best else { break };
        ends.remove(between);
    }
    match ends[..] {
        [_, middle, _] => Some(token.split_at(middle)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_made_of_what_better_ranks_leave() {
        let tokens = ["a", "b", "c", "ab", "bc", "abc", "cabc", "cc", "aaaa"];
        let ranks = tokens.iter().copied().zip(0..).collect();
        let pairs = merges(&ranks);
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        // "aaaa" is made by no merge: "aa" is no token.
        let all = [
            ("a", "b"),
            ("b", "c"),
            ("ab", "c"),
            ("c", "abc"),
            ("c", "c"),
        ];
        assert_eq!(pairs, all);
    }
}
