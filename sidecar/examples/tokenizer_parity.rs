//! Reads conversations with the ids that somebody else makes of them, one JSON object to a line, and
//! tells how many come out otherwise here: whole, in parts, and with parts remembered.

use std::io::BufRead;
use std::process::ExitCode;

use anyhow::Context;
use kv_core::surface::Surface;
use kv_router::text::{Model, Prompt};
use serde::Deserialize;

/// Bytes between two cuts: few, so that there are many.
const WINDOW: usize = 64;
/// Differences that are shown.
const SHOWN: u32 = 3;

#[derive(Deserialize)]
struct Case {
    /// Body of the request.
    body: String,
    /// The ids; none where the template refuses.
    ids: Option<Vec<u32>>,
    /// What the template makes of it, or why it refuses.
    text: String,
}

#[derive(Default)]
struct Tally {
    cases: u32,
    refused: u32,
    texts: u32,
    ids: u32,
    parts: u32,
    remembered: usize,
    tokens: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let folder = std::env::args().nth(1).context("which folder?")?;
    let model = Model::load(folder.as_ref(), 64 << 20, 1)?.with_window(WINDOW);
    let template = model.template.as_ref().context("no chat template")?;
    let mut tally = Tally::default();
    for line in std::io::stdin().lock().lines() {
        let case: Case = serde_json::from_str(&line?)?;
        tally.cases += 1;
        let Prompt::Chat(chat) = Prompt::parse(Surface::Chat, case.body.as_bytes())? else {
            anyhow::bail!("not a chat: {}", case.body);
        };
        let text = template.render(&chat.into_chat(template.takes_parts()));
        let (text, ids) = match (text, case.ids) {
            (Ok(text), Some(ids)) => (text, ids),
            (Err(_), None) => {
                tally.refused += 1;
                continue;
            }
            (text, _) => {
                tally.show(&format!("{text:?}"), &case.text);
                tally.texts += 1;
                continue;
            }
        };
        if text != case.text {
            tally.show(&text, &case.text);
            tally.texts += 1;
            continue;
        }
        tally.tokens += ids.len();
        if model.tokens.encoder().whole(&text)? != ids {
            tally.show(&text, "other ids");
            tally.ids += 1;
        }
        // Some of it is there from the beginning of the text, then all of it.
        let middle = (0..=text.len() / 2)
            .rev()
            .find(|at| text.is_char_boundary(*at));
        model.tokens.encode(&text[..middle.unwrap_or(0)], None)?;
        for _ in 0..2 {
            let encoded = model.tokens.encode(&text, None)?;
            tally.remembered += encoded.remembered;
            if encoded.ids != ids {
                tally.show(&text, "other ids in parts");
                tally.parts += 1;
            }
        }
    }
    let Tally {
        cases,
        refused,
        texts,
        ids,
        parts,
        remembered,
        tokens,
    } = tally;
    let share = 100 * remembered / (2 * tokens).max(1);
    println!(
        "{cases} conversations, {refused} refused by both; differ: {texts} texts, {ids} ids, {parts} in parts; {share} % remembered"
    );
    let same = texts + ids + parts == 0;
    Ok(if same {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Tally {
    /// Shows where two texts part.
    fn show(&self, ours: &str, theirs: &str) {
        if self.texts + self.ids + self.parts >= SHOWN {
            return;
        }
        let mut both = ours.char_indices().zip(theirs.chars());
        let at = both.find(|((_, a), b)| a != b);
        let at = at.map_or(ours.len().min(theirs.len()), |((at, _), _)| at);
        let near = |text: &str| {
            let before = text.char_indices().map(|(i, _)| i).take_while(|i| *i <= at);
            let start = before.collect::<Vec<_>>().into_iter().rev().nth(40);
            let rest = text.get(start.unwrap_or(0)..).unwrap_or(text);
            rest.chars().take(160).collect::<String>()
        };
        eprintln!("  ours   {:?}\n  theirs {:?}", near(ours), near(theirs));
    }
}
