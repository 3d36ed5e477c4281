//! Paths, bodies and answers.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, patch, post};
use axum::{Json, Router};
use kv_core::id::OwnerId;
use serde_json::{Value, json};
use tokio::sync::{Mutex, RwLock, mpsc, oneshot};
use tokio::time::Instant;

use super::answer::{
    Load, PartitionLoads, Reserved, Score, Scores, Selected, SharedCache, WorkerLoad,
};
use super::choice::{Then, takes};
use super::request::{Asked, DEFAULT, Filter, Output};
use super::{Ask, Booking, Catalog, Choice, Hashed, Question, SelectError, Served, Stage, workers};
use crate::ask::ask;
use crate::index::{Control, Field, random_u64};
use crate::indexer::{self, failed};
use crate::metrics::{Kind, Metrics};
use crate::token::Token;

/// Longest body, as Dynamo has it: a million tokens as text.
const LONGEST_BODY: usize = 8 << 20;
/// Tokens that a worker takes at a time if it does not say, as Dynamo has it.
const PREFILL_CAPACITY: u64 = 10_000_000;

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Face {
    control: mpsc::Sender<Control>,
    pub(super) registry: mpsc::Sender<indexer::Ask>,
    pub(super) catalog: Arc<RwLock<Arc<Catalog>>>,
    /// Held by who changes the catalog.
    pub(super) changes: Arc<Mutex<()>>,
    metrics: Arc<Metrics>,
    token: Option<Token>,
}

type Body = Result<Json<Asked>, JsonRejection>;

impl Face {
    /// Asks the index through `control` and the keeper of the configuration through `registry`.
    /// With a token, only clients that show it are answered.
    #[must_use]
    pub fn new(
        control: mpsc::Sender<Control>,
        registry: mpsc::Sender<indexer::Ask>,
        metrics: Arc<Metrics>,
        token: Option<String>,
    ) -> Self {
        Self {
            control,
            registry,
            catalog: Arc::default(),
            changes: Arc::default(),
            metrics,
            token: token.map(Token::new),
        }
    }

    async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> Ask,
    ) -> Result<T, SelectError> {
        let question = |reply| Control::Select(question(reply));
        ask(&self.control, question).await.ok_or(SelectError::Gone)
    }

    /// Whether who sends these headers may see everything.
    pub(super) fn trusts(&self, headers: &HeaderMap) -> bool {
        self.token
            .as_ref()
            .is_none_or(|token| token.is_shown(headers))
    }

    pub(super) async fn served(&self) -> Result<Arc<[Served]>, SelectError> {
        self.ask(Ask::Served).await
    }

    /// The catalog as it is.
    pub(super) async fn roll(&self) -> Arc<Catalog> {
        Arc::clone(&*self.catalog.read().await)
    }

    /// The partition that a request asks for, in which somebody takes requests.
    async fn partition(&self, asked: &Asked, catalog: &Catalog) -> Result<Served, SelectError> {
        let all = self.served().await?;
        let is_open = |served: &&Served| {
            let mut owners = served.pool.owners.iter();
            owners.any(|owner| takes(catalog, owner))
        };
        let group = &asked.routing_group;
        let in_group = || all.iter().filter(|served| served.group == *group);
        let mut named = in_group();
        let named = named.find(|s| s.models.iter().any(|model| model == asked.model()));
        // As Envoy's filters have it: a pool that names no models takes any.
        let takes_any =
            |served: &&Served| asked.model_name.is_none() || served.pool.models.is_empty();
        let found = named.or_else(|| in_group().find(|s| *group == DEFAULT && takes_any(s)));
        if let Some(served) = found.filter(is_open) {
            return Ok(served.clone());
        }
        Err(if all.iter().any(|served| is_open(&served)) {
            SelectError::NoneFor {
                model: asked.model().to_owned(),
                group: group.clone(),
            }
        } else {
            SelectError::NoWorkers
        })
    }

    /// What a prompt meets, and whether owners take requests.
    async fn meet(&self, served: &Served, prompt: Hashed) -> Result<Field, SelectError> {
        let pool = served.number;
        let ask = |reply| Ask::Meet {
            pool,
            prompt,
            reply,
        };
        self.ask(ask).await?.ok_or(SelectError::NoWorkers)
    }

    async fn choose(
        &self,
        asked: &mut Asked,
        then: Then,
    ) -> Result<(Choice, Arc<Catalog>, u32), SelectError> {
        let catalog = self.roll().await;
        let served = self.partition(asked, &catalog).await?;
        self.settle(asked, &catalog);
        let prompt = asked.hashed(&served.pool)?;
        let tokens = prompt.tokens;
        let question = Question {
            pool: served.number,
            prompt,
            lora: asked.lora_name.clone(),
            constraints: asked.constraints(),
            catalog: Arc::clone(&catalog),
            tracks_prefill: asked.tracks_prefill(),
            reuses: asked.reuses(),
            then,
        };
        let ask = |reply| Ask::Choose(Box::new(question), reply);
        let choice = self.ask(ask).await??;
        Ok((choice, catalog, tokens))
    }

    /// What the workers say about prompts of their model, where the request doesn't.
    fn settle(&self, asked: &mut Asked, catalog: &Catalog) {
        if asked.is_eagle.is_none() && catalog.is_eagle(asked.model(), &asked.routing_group) {
            asked.is_eagle = Some(true);
        }
    }

    fn count<T>(&self, kind: &'static str, outcome: &Result<T, SelectError>) {
        let kind = match outcome {
            Ok(_) => kind,
            Err(error) => error.kind(),
        };
        self.metrics.selects.get_or_create(&Kind { kind }).inc();
    }
}

/// The routes.
pub fn router(face: Face) -> Router {
    Router::new()
        .route("/select", post(select))
        .route("/select_and_reserve", post(select_and_reserve))
        .route("/reservations", post(reserve))
        .route("/reservations/{id}", delete(free))
        .route("/reservations/{id}/prefill_complete", post(prefilled))
        .route("/reservations/{id}/output_block", post(filled))
        .route("/workers", post(workers::create).get(workers::list))
        .route(
            "/workers/{id}",
            patch(workers::change).delete(workers::remove),
        )
        .route("/loads", get(loads))
        .route("/potential_loads", post(potential_loads))
        .route("/overlap_scores", post(overlap_scores))
        .route("/replica_sync/peers", get(async || Json(json!([]))))
        .route("/replica_sync/register_peer", post(no_replica_sync))
        .route("/replica_sync/deregister_peer", post(no_replica_sync))
        .route_layer(from_fn_with_state(face.clone(), authorised))
        .route("/ready", get(workers::ready))
        .route("/health", get(async || ok(StatusCode::OK)))
        .fallback(async || failed(StatusCode::NOT_FOUND, "route not found"))
        .method_not_allowed_fallback(async || {
            failed(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        })
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(face)
}

async fn authorised(State(face): State<Face>, request: Request, next: Next) -> Response {
    if !face.trusts(request.headers()) {
        return failed(StatusCode::UNAUTHORIZED, "the token is missing or wrong");
    }
    next.run(request).await
}

pub(super) fn ok(status: StatusCode) -> Response {
    (status, Json(json!({ "status": "ok" }))).into_response()
}

pub(super) fn refused(rejection: &JsonRejection) -> Response {
    failed(rejection.status(), rejection.body_text())
}

async fn no_replica_sync() -> SelectError {
    SelectError::NoReplicaSync
}

/// The address of a choice for clients.
fn endpoint(catalog: &Catalog, owner: OwnerId, of_table: &str) -> String {
    if of_table.is_empty() {
        let record = catalog.schedulable(owner.worker);
        record
            .and_then(|r| r.traits.endpoint.clone())
            .unwrap_or_default()
    } else {
        workers::url(of_table)
    }
}

async fn select(State(face): State<Face>, body: Body) -> Response {
    let Json(mut asked) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    timed(&face, "selected", selected(&face, &mut asked)).await
}

/// The answer of a choice, counted as `kind` and timed.
async fn timed(
    face: &Face,
    kind: &'static str,
    choosing: impl Future<Output = Result<Value, SelectError>>,
) -> Response {
    let at = Instant::now();
    let outcome = choosing.await;
    face.count(kind, &outcome);
    face.metrics.select_time.observe(at.elapsed().as_secs_f64());
    answered(outcome, StatusCode::OK)
}

fn answered(outcome: Result<Value, SelectError>, status: StatusCode) -> Response {
    match outcome {
        Ok(value) => (status, Json(value)).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn selected(face: &Face, asked: &mut Asked) -> Result<Value, SelectError> {
    let id = asked.id()?.map(str::to_owned);
    let then = id.clone().map_or(Then::Nothing, Then::Keep);
    let (choice, catalog, _) = face.choose(asked, then).await?;
    let endpoint = endpoint(&catalog, choice.owner, &choice.endpoint);
    let partition = (asked.model(), asked.routing_group.as_str());
    let mut answer = Selected::new(&choice, partition, endpoint, id);
    if asked.advisory {
        let record = catalog.schedulable(choice.owner.worker);
        let batched = record.and_then(|r| r.traits.max_num_batched_tokens);
        answer = answer.loaded(WorkerLoad {
            active_prefill_tokens: choice.active_prefill_tokens,
            prefill_token_capacity: batched.unwrap_or(PREFILL_CAPACITY),
            total_kv_blocks: record.and_then(|r| r.traits.total_kv_blocks),
        });
    }
    Ok(json!(answer))
}

async fn select_and_reserve(State(face): State<Face>, body: Body) -> Response {
    let Json(mut asked) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    timed(&face, "reserved", selected_and_reserved(&face, &mut asked)).await
}

async fn selected_and_reserved(face: &Face, asked: &mut Asked) -> Result<Value, SelectError> {
    let id = asked.id()?.map_or_else(fresh_id, str::to_owned);
    let (choice, catalog, tokens) = face.choose(asked, Then::Book(id.clone())).await?;
    let endpoint = endpoint(&catalog, choice.owner, &choice.endpoint);
    let partition = (asked.model(), asked.routing_group.as_str());
    let answer = Selected::new(&choice, partition, endpoint, Some(id));
    Ok(json!(answer.booked(&choice, tokens)))
}

fn fresh_id() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

async fn reserve(State(face): State<Face>, body: Body) -> Response {
    let Json(mut asked) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    let outcome = reserved(&face, &mut asked).await;
    face.count("reserved", &outcome);
    answered(outcome, StatusCode::CREATED)
}

async fn reserved(face: &Face, asked: &mut Asked) -> Result<Value, SelectError> {
    let id = asked.id()?.map(str::to_owned);
    let id = id.ok_or_else(|| SelectError::Invalid("selection_id is required".to_owned()))?;
    let catalog = face.roll().await;
    let served = face.partition(asked, &catalog).await;
    let owner = match asked.worker_id {
        Some(worker) => {
            let rank = asked.dp_rank.unwrap_or(0);
            let booking = booking(
                face,
                asked,
                &served?,
                &catalog,
                OwnerId { worker, rank },
                &id,
            )?;
            let owner = booking.owner;
            let ask = |reply| Ask::Book(Box::new(booking), reply);
            face.ask(ask).await??;
            owner
        }
        None => {
            let claimed = match &served {
                Ok(served) => {
                    let (pool, id) = (served.number, id.clone());
                    face.ask(|reply| Ask::Claim { pool, id, reply }).await??
                }
                Err(_) => None,
            };
            claimed.ok_or_else(|| SelectError::NotPending {
                id: id.clone(),
                model: asked.model().to_owned(),
                group: asked.routing_group.clone(),
            })?
        }
    };
    let served = face.partition(asked, &catalog).await?;
    let of_table = served.pool.owners.iter().find(|o| o.id == owner);
    let of_table = of_table.map_or("", |owner| &owner.endpoint);
    Ok(json!(Reserved {
        selection_id: &id,
        model_name: asked.model(),
        routing_group: &asked.routing_group,
        worker_id: owner.worker,
        dp_rank: owner.rank,
        endpoint: endpoint(&catalog, owner, of_table),
    }))
}

/// A booking at the worker that a request names.
fn booking(
    face: &Face,
    asked: &mut Asked,
    served: &Served,
    catalog: &Catalog,
    owner: OwnerId,
    id: &str,
) -> Result<Booking, SelectError> {
    face.settle(asked, catalog);
    let prompt = asked.tracked(&served.pool)?;
    let effective = asked.effective_prefill_tokens;
    if let Some(effective) = effective.filter(|tokens| *tokens > prompt.tokens.into()) {
        return Err(SelectError::Effective {
            effective,
            tokens: prompt.tokens,
        });
    }
    let mut owners = served.pool.owners.iter();
    if !owners.any(|o| o.id == owner && takes(catalog, o)) {
        return Err(SelectError::NotSchedulable {
            worker: owner.worker,
            model: asked.model().to_owned(),
            group: asked.routing_group.clone(),
        });
    }
    let is_tracked = asked.track_prefill_tokens != Some(false);
    let effective = effective.filter(|_| is_tracked).unwrap_or(0);
    Ok(Booking {
        id: id.to_owned(),
        pool: served.number,
        owner,
        hashes: prompt.used,
        is_shared: asked.reuses() != Some(false),
        prefill_tokens: u32::try_from(effective).unwrap_or(u32::MAX),
    })
}

async fn advance(face: &Face, id: String, stage: Stage, kind: &'static str) -> Response {
    let outcome = face.ask(|reply| Ask::Advance(id, stage, reply)).await;
    let outcome = outcome.and_then(|outcome| outcome);
    face.count(kind, &outcome);
    match outcome {
        Ok(()) => ok(StatusCode::OK),
        Err(error) => error.into_response(),
    }
}

async fn prefilled(State(face): State<Face>, Path(id): Path<String>) -> Response {
    advance(&face, id, Stage::Prefilled, "prefilled").await
}

async fn free(State(face): State<Face>, Path(id): Path<String>) -> Response {
    advance(&face, id, Stage::Over, "freed").await
}

async fn filled(
    State(face): State<Face>,
    Path(id): Path<String>,
    body: Result<Json<Output>, JsonRejection>,
) -> Response {
    let left = match body {
        Ok(Json(output)) => output.decay_fraction,
        Err(rejection) => return refused(&rejection),
    };
    if left.is_some_and(|left| !(0.0..=1.0).contains(&left)) {
        return SelectError::Decay.into_response();
    }
    #[allow(clippy::cast_possible_truncation)]
    let left = left.map(|left| left as f32);
    advance(&face, id, Stage::Filled(left), "filled").await
}

async fn loads(State(face): State<Face>, Query(filter): Query<Filter>) -> Response {
    let outcome = async {
        let catalog = face.roll().await;
        let all = face.served().await?;
        let mut answers = Vec::new();
        for served in all.iter().filter(|s| filter.wants(&s.models, &s.group)) {
            let field = face.meet(served, Hashed::default()).await?;
            let loads = standings(&field, &catalog);
            let loads: Vec<Load> = loads.map(|(owner, s)| Load::new(owner, s)).collect();
            answers.push(json!(PartitionLoads {
                model_name: served.models.first().map_or("", String::as_str),
                routing_group: &served.group,
                loads,
                pending_count: 0,
                pending_isl_tokens: 0,
            }));
        }
        Ok(Value::from(answers))
    };
    answered(outcome.await, StatusCode::OK)
}

/// Owners that take requests.
fn standings<'a>(
    field: &'a Field,
    catalog: &'a Catalog,
) -> impl Iterator<Item = (&'a kv_core::table::Owner, &'a crate::index::Standing)> {
    let all = field.pool.owners.iter().zip(&field.standings);
    all.filter(|(owner, _)| takes(catalog, owner))
}

async fn potential_loads(State(face): State<Face>, body: Body) -> Response {
    let Json(mut asked) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    let outcome = async {
        let catalog = face.roll().await;
        let served = face.partition(&asked, &catalog).await?;
        face.settle(&mut asked, &catalog);
        let prompt = asked.hashed(&served.pool)?;
        let mut field = face.meet(&served, prompt.clone()).await?;
        if asked.reuses() == Some(false) {
            for standing in &mut field.standings {
                standing.shared_blocks = 0;
            }
        }
        let tracks = served.pool.policy.tracking.prefill_tokens;
        let prefill = asked.tracks_prefill().unwrap_or(tracks);
        let with = |place| Load::with(&field, place, &prompt, prefill);
        let loads: Vec<Load> = standings(&field, &catalog).map(with).collect();
        Ok(json!(loads))
    };
    answered(outcome.await, StatusCode::OK)
}

async fn overlap_scores(State(face): State<Face>, body: Body) -> Response {
    let Json(mut asked) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    let outcome = async {
        let catalog = face.roll().await;
        let served = face.partition(&asked, &catalog).await?;
        face.settle(&mut asked, &catalog);
        let prompt = asked.hashed(&served.pool)?;
        let num_blocks = prompt.held.len();
        let field = face.meet(&served, prompt).await?;
        let is_stored = !field.pool.stores.is_empty();
        let score = |(owner, standing)| Score::new(owner, standing, is_stored);
        Ok(json!(Scores {
            block_size: served.pool.block_size,
            num_blocks,
            workers: standings(&field, &catalog).map(score).collect(),
            shared_cache: SharedCache::new(&field),
        }))
    };
    answered(outcome.await, StatusCode::OK)
}
