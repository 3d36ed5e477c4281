//! `POST /v1/explain`: what would be chosen for a prompt, and why.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use kv_core::constraint::Constraints;
use kv_core::cost::Demand;
use kv_core::decide::{Price, Record, Request, Scored, Terms, decide};
use kv_core::family::Namespace;
use kv_core::hash::{Hashing, Seed, sequence_hashes};
use kv_core::holdings::named;
use kv_core::id::{DpRank, Tier, WorkerId};
use kv_core::policy::{Mode, Policy};
use kv_core::rng::Rng;
use kv_core::scan::{Prompt, Scanner};
use kv_core::table::{Pool, Table};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Admin;
use super::error::AdminError;
use crate::index::{Available, Control, Field, random_u64};
use crate::load::LoadReport;

/// A question in our own form. Anything without `tokens` is taken for an OpenAI request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    pool: Option<String>,
    model: Option<String>,
    tokens: Vec<u32>,
    lora: Option<String>,
    cache_salt: Option<String>,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    /// The pool that serves the model.
    pool: &'a str,
    /// Whether some pool names the model; otherwise the first pool serves it.
    known_model: bool,
    /// The adapter, where the model is one.
    lora: Option<&'a str>,
    /// Tokens to a block.
    block_size: u32,
    /// The pool's policy.
    policy: &'a Policy,
    /// Whether load is known; without it all owners count as idle.
    load: Available,
    /// Owners that share the least cost: one of them is chosen at random.
    ties: usize,
    /// The choice. In other modes than `kv`, and with a temperature, it is left open.
    decision: Record<'a>,
    /// All owners, cheapest first.
    owners: Vec<Explained<'a>>,
}

/// An owner with each term of its cost.
#[derive(Debug, Serialize)]
struct Explained<'a> {
    worker: WorkerId,
    rank: DpRank,
    slot: u16,
    endpoint: &'a str,
    /// Blocks of the prompt by tier: device, host, disk, external.
    overlap: [u32; Tier::COUNT],
    /// Blocks beyond them that a shared store has.
    shared_cache: u32,
    load: LoadReport,
    /// Blocks of the prompt in use there.
    shared_blocks: u32,
    /// Credit for cached blocks, in Dynamo's formula.
    #[serde(skip_serializing_if = "Option::is_none")]
    credit: Option<f64>,
    #[serde(flatten)]
    terms: Terms,
    cost: f64,
    chosen: bool,
}

pub(super) async fn explain(
    State(admin): State<Admin>,
    body: Bytes,
) -> Result<Json<Value>, AdminError> {
    let question = Question::read(&body)?;
    let table: Table = admin.ask(Control::Table).await?;
    let (pool, model) = (question.pool.as_deref(), question.model.as_deref());
    if let Some(name) = pool.filter(|name| table.pools.iter().all(|p| p.name != *name)) {
        return Err(AdminError::NoSuchPool(name.to_owned()));
    }
    let served = table.serve(pool, model).ok_or(AdminError::ShuttingDown)?;
    let (number, known_model) = (served.pool, served.known || model.is_none());
    let lora = question.lora.as_deref().or(served.lora);
    let block_size = table.pools.get(number).map_or(1, |p| p.block_size);
    let seed = Seed::new(
        lora.unwrap_or_default(),
        question.cache_salt.as_deref().unwrap_or_default(),
    );
    let hashing = Hashing::new(block_size as usize, seed);
    let prompt = sequence_hashes(&question.tokens, hashing);
    let namespace = Namespace {
        lora: lora.unwrap_or_default(),
        salt: question.cache_salt.as_deref().unwrap_or_default(),
    };
    let schemes = table.pools.get(number).map_or(&[][..], |p| &p.families);
    let families = named(schemes, block_size, &question.tokens, namespace);
    let field = admin
        .ask(|reply| Control::Overlaps {
            pool: number,
            prompt,
            families,
            reply,
        })
        .await?
        .ok_or(AdminError::ShuttingDown)?;
    let demand = Demand {
        tokens: u32::try_from(question.tokens.len()).unwrap_or(u32::MAX),
        block_size,
    };
    let answer = answer(&field, demand, lora, known_model);
    serde_json::to_value(answer)
        .map(Json)
        .map_err(|e| AdminError::Body(e.to_string()))
}

fn answer<'a>(
    field: &'a Field,
    demand: Demand,
    lora: Option<&'a str>,
    known_model: bool,
) -> Answer<'a> {
    let pool = &*field.pool;
    let constraints = Constraints {
        lora: lora.unwrap_or_default().to_owned(),
        ..Constraints::default()
    };
    let candidates = field.candidates(&constraints);
    let request = Request {
        demand,
        trust: 1.0,
        turn: 0,
        // What is usual is learned by each proxy for itself.
        typical_ms: 0.0,
        bound: None,
    };
    let mut rng = Rng::new(random_u64());
    let (scored, chosen) = decide(&candidates, &request, &pool.policy, &mut rng);
    let is_open = pool.policy.mode != Mode::Kv || pool.policy.temperature > 0.0;
    let chosen = chosen.filter(|_| !is_open);
    let least = scored
        .iter()
        .map(Scored::total)
        .fold(f64::INFINITY, f64::min);
    let ties = scored.iter().filter(|s| s.total() == least).count();
    let mut owners: Vec<Explained<'a>> = scored
        .iter()
        .enumerate()
        .filter_map(|(i, s)| explained(pool, s, chosen == Some(i)))
        .collect();
    owners.sort_by(|a, b| a.cost.total_cmp(&b.cost));
    Answer {
        pool: &pool.name,
        known_model,
        lora,
        block_size: pool.block_size,
        policy: &pool.policy,
        load: Available::new(field.is_load_known),
        ties,
        decision: Record::new(pool, pool.policy.mode.name(), demand, &scored, chosen),
        owners,
    }
}

fn explained<'a>(pool: &'a Pool, scored: &Scored, chosen: bool) -> Option<Explained<'a>> {
    let owner = pool.owners.get(scored.candidate.owner)?;
    Some(Explained {
        worker: owner.id.worker,
        rank: owner.id.rank,
        slot: owner.slot.0,
        endpoint: &owner.endpoint,
        overlap: scored.candidate.overlap.by_tier(),
        shared_cache: scored.candidate.overlap.shared_cache,
        load: scored.candidate.load.into(),
        shared_blocks: scored.candidate.shared_blocks,
        credit: match scored.cost {
            Price::Blocks(cost) => Some(cost.credit),
            Price::Delay(_) => None,
        },
        terms: scored.into(),
        cost: scored.total(),
        chosen,
    })
}

impl Question {
    fn read(body: &[u8]) -> Result<Self, AdminError> {
        let invalid = |e: &dyn std::fmt::Display| AdminError::Body(e.to_string());
        let value: Value = serde_json::from_slice(body).map_err(|e| invalid(&e))?;
        if value.get("tokens").is_some() {
            return serde_json::from_value(value).map_err(|e| invalid(&e));
        }
        // As the filter reads it.
        let mut scanner = Scanner::new(body.len());
        scanner.feed(body);
        let scan = scanner.finish().map_err(|e| invalid(&e))?;
        let tokens = match scan.prompt {
            Prompt::Tokens(tokens) => tokens.into_ids(),
            Prompt::Absent => return Err(AdminError::NoTokens("there is no `prompt`")),
            Prompt::Text => return Err(AdminError::NoTokens("it is text")),
            // The scanner keeps as many ids as the body has bytes.
            Prompt::TooManyTokens | Prompt::Unsupported => {
                return Err(AdminError::NoTokens("it is not one array of ids"));
            }
        };
        Ok(Self {
            pool: None,
            model: scan.model.value().cloned(),
            tokens,
            lora: None,
            cache_salt: scan.cache_salt.value().cloned(),
        })
    }
}
