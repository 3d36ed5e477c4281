//! Workers that register here, and all that are selected among.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use kv_core::id::{DpRank, Role, WorkerId};
use serde_json::json;
use tokio::sync::oneshot;

use super::record::{Lifecycle, Record, Traits, Worker};
use super::request::Filter;
use super::routes::{Face, refused};
use super::{Catalog, SelectError, Served};
use crate::ask::ask;
use crate::indexer::{self, Registration, RegistryError, Unregistration};

/// Where clients reach a worker of the table.
pub(super) fn url(endpoint: &str) -> String {
    format!("http://{endpoint}")
}

pub(super) async fn create(
    State(face): State<Face>,
    body: Result<Json<Worker>, JsonRejection>,
) -> Response {
    let Json(worker) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    match face.enrol(worker.into()).await {
        Ok(record) => (StatusCode::CREATED, Json(record)).into_response(),
        Err(error) => error.into_response(),
    }
}

pub(super) async fn change(
    State(face): State<Face>,
    Path(worker): Path<WorkerId>,
    body: Result<Json<Traits>, JsonRejection>,
) -> Response {
    let Json(patch) = match body {
        Ok(body) => body,
        Err(rejection) => return refused(&rejection),
    };
    let outcome = async {
        let catalog = face.roll().await;
        let Some(record) = catalog.records.get(&worker) else {
            return Err(face.not_registered(worker).await);
        };
        let mut record = record.clone();
        record.traits.patch(patch);
        face.enrol(record).await
    };
    match outcome.await {
        Ok(record) => Json(record).into_response(),
        Err(error) => error.into_response(),
    }
}

pub(super) async fn remove(State(face): State<Face>, Path(worker): Path<WorkerId>) -> Response {
    match face.strike(worker).await {
        Ok(record) => Json(record).into_response(),
        Err(error) => error.into_response(),
    }
}

pub(super) async fn list(State(face): State<Face>, Query(filter): Query<Filter>) -> Response {
    let all = match face.records().await {
        Ok(all) => all,
        Err(error) => return error.into_response(),
    };
    let wanted = all.into_iter().filter(|record| {
        filter.wants(
            std::slice::from_ref(&record.model_name),
            &record.routing_group,
        )
    });
    Json(wanted.collect::<Vec<_>>()).into_response()
}

/// Tells anybody whether somebody takes requests, and who is trusted whom there is.
pub(super) async fn ready(State(face): State<Face>, headers: HeaderMap) -> Response {
    let workers = match face.records().await {
        Ok(all) => all,
        Err(error) => return error.into_response(),
    };
    let is_schedulable = |record: &&Record| record.lifecycle == Lifecycle::Schedulable;
    let schedulable = workers.iter().filter(is_schedulable).count();
    let status = if schedulable > 0 {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let mut answer = json!({"ready": schedulable > 0, "schedulable_workers": schedulable});
    if face.trusts(&headers) {
        answer["workers"] = json!(workers);
    }
    (status, Json(answer)).into_response()
}

impl Face {
    /// All workers, by model, group and id.
    async fn records(&self) -> Result<Vec<Record>, SelectError> {
        let (served, catalog) = (self.served().await?, self.roll().await);
        let configured = served.iter().flat_map(configured);
        let mut all: Vec<Record> = catalog.records.values().cloned().collect();
        all.extend(configured);
        let key = |record: &Record| {
            let Record {
                worker_id,
                model_name,
                routing_group,
                ..
            } = record;
            (model_name.clone(), routing_group.clone(), *worker_id)
        };
        all.sort_by_cached_key(key);
        Ok(all)
    }

    /// Why a worker that is not in the catalog can't be changed.
    async fn not_registered(&self, worker: WorkerId) -> SelectError {
        let served = match self.served().await {
            Ok(served) => served,
            Err(error) => return error,
        };
        let mut owners = served.iter().flat_map(|served| &served.pool.owners);
        if owners.any(|owner| owner.id.worker == worker && !owner.endpoint.is_empty()) {
            SelectError::Configured(worker)
        } else {
            SelectError::NoWorker(worker)
        }
    }

    /// Takes a worker in, in place of one with the same id. What it lacks is in its record.
    async fn enrol(&self, mut record: Record) -> Result<Record, SelectError> {
        let _change = self.changes.lock().await;
        let id = record.worker_id;
        let catalog = self.roll().await;
        if let error @ SelectError::Configured(_) = self.not_registered(id).await {
            return Err(error);
        }
        let before = catalog.schedulable(id);
        record.not_schedulable_reasons = record.traits.lacks();
        let stays = |before: &&Record| {
            record.not_schedulable_reasons.is_empty()
                && before.model_name == record.model_name
                && before.routing_group == record.routing_group
                && before.traits.block_size == record.traits.block_size
        };
        let old = before.filter(stays).map(Sources::of).unwrap_or_default();
        if let Some(before) = before.filter(|before| !stays(before)) {
            // Nobody is to choose it while it goes.
            self.replace(id, None).await;
            self.unregister(before, None).await?;
        }
        if record.not_schedulable_reasons.is_empty() {
            let new = Sources::of(&record);
            for rank in old.ranks_other_than(&new) {
                self.unregister(&record, Some(rank)).await?;
            }
            if let Err(why) = self.register(&record, new.beside(&old)).await? {
                self.unregister(&record, None).await?;
                let why = format!("reconciliation failed: {why}");
                record.not_schedulable_reasons.push(why);
            }
        }
        record.lifecycle = if record.not_schedulable_reasons.is_empty() {
            Lifecycle::Schedulable
        } else {
            Lifecycle::Incomplete
        };
        self.replace(id, Some(record.clone())).await;
        Ok(record)
    }

    /// Takes a worker out.
    async fn strike(&self, worker: WorkerId) -> Result<Record, SelectError> {
        let _change = self.changes.lock().await;
        let catalog = self.roll().await;
        let Some(record) = catalog.records.get(&worker) else {
            return Err(self.not_registered(worker).await);
        };
        self.replace(worker, None).await;
        self.unregister(record, None).await?;
        Ok(Record {
            lifecycle: Lifecycle::Unschedulable,
            not_schedulable_reasons: Vec::new(),
            ..record.clone()
        })
    }

    async fn replace(&self, worker: WorkerId, record: Option<Record>) {
        let mut catalog = self.catalog.write().await;
        let mut next = Catalog::clone(&catalog);
        match record {
            Some(record) => next.records.insert(worker, record),
            None => next.records.remove(&worker),
        };
        *catalog = Arc::new(next);
    }

    async fn ask_registry<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> indexer::Ask,
    ) -> Result<T, SelectError> {
        ask(&self.registry, question).await.ok_or(SelectError::Gone)
    }

    /// Lets the index read these ranks' events.
    async fn register(
        &self,
        record: &Record,
        ranks: Vec<(DpRank, String)>,
    ) -> Result<Result<(), RegistryError>, SelectError> {
        for (rank, endpoint) in ranks {
            let registration = Registration {
                instance: record.worker_id,
                rank,
                model: record.model_name.clone(),
                group: record.routing_group.clone(),
                block_size: record.traits.block_size.unwrap_or_default(),
                endpoint,
                replay: record.traits.replay_endpoint.clone(),
            };
            let asked = self.ask_registry(|reply| indexer::Ask::Register(registration, reply));
            if let Err(why) = asked.await? {
                return Ok(Err(why));
            }
        }
        Ok(Ok(()))
    }

    /// Reads a rank's events no more, or those of no rank.
    async fn unregister(&self, record: &Record, rank: Option<DpRank>) -> Result<(), SelectError> {
        let unregistration = Unregistration {
            instance: record.worker_id,
            model: record.model_name.clone(),
            group: Some(record.routing_group.clone()),
            rank,
        };
        let asked = self.ask_registry(|reply| indexer::Ask::Unregister(unregistration, reply));
        // One that is not there is gone, too.
        let _ = asked.await?;
        Ok(())
    }
}

/// Where the ranks of a worker publish.
#[derive(Debug, Default)]
struct Sources {
    endpoints: BTreeMap<DpRank, String>,
    replay: Option<String>,
}

impl Sources {
    fn of(record: &Record) -> Self {
        let ranks = record.traits.ranks();
        let mut endpoints = record.traits.sources();
        endpoints.retain(|rank, _| ranks.contains(rank));
        Self {
            endpoints,
            replay: record.traits.replay_endpoint.clone(),
        }
    }

    fn has(&self, rank: DpRank, endpoint: &str, replay: Option<&String>) -> bool {
        self.endpoints.get(&rank).is_some_and(|own| own == endpoint)
            && self.replay.as_ref() == replay
    }

    /// Own ranks that are not the same in another.
    fn ranks_other_than(&self, other: &Self) -> Vec<DpRank> {
        let own = self.endpoints.iter();
        let differs = |(rank, endpoint): &(&DpRank, &String)| {
            !other.has(**rank, endpoint, self.replay.as_ref())
        };
        own.filter(differs).map(|(rank, _)| *rank).collect()
    }

    /// The same with their endpoints.
    fn beside(&self, other: &Self) -> Vec<(DpRank, String)> {
        let ranks = self.ranks_other_than(other).into_iter();
        ranks
            .filter_map(|rank| Some((rank, self.endpoints.get(&rank)?.clone())))
            .collect()
    }
}

/// Workers of a pool that Envoy sends requests to.
fn configured(served: &Served) -> Vec<Record> {
    let routed = served.pool.owners.iter();
    let routed = routed.filter(|o| !o.endpoint.is_empty() && o.role == Role::Aggregated);
    let mut ranks: BTreeMap<WorkerId, (BTreeSet<DpRank>, &kv_core::table::Owner)> = BTreeMap::new();
    for owner in routed {
        let entry = ranks.entry(owner.id.worker);
        entry
            .or_insert((BTreeSet::new(), owner))
            .0
            .insert(owner.id.rank);
    }
    let record =
        |(worker_id, (ranks, owner)): (WorkerId, (BTreeSet<DpRank>, &kv_core::table::Owner))| {
            let size = u32::try_from(ranks.len()).unwrap_or(u32::MAX);
            Record {
                worker_id,
                model_name: served.models.first().cloned().unwrap_or_default(),
                routing_group: served.group.clone(),
                lifecycle: if owner.accepting {
                    Lifecycle::Schedulable
                } else {
                    Lifecycle::Unschedulable
                },
                traits: Traits::configured(
                    url(&owner.endpoint),
                    served.pool.block_size,
                    size,
                    &owner.metadata,
                ),
                not_schedulable_reasons: Vec::new(),
            }
        };
    ranks.into_iter().map(record).collect()
}
