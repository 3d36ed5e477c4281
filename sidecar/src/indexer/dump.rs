//! `/dump`: every partition as stores, owner by owner.

use std::collections::VecDeque;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::stream;
use kv_core::id::OwnerId;

use super::routes::{Face, Gone};
use crate::index::{Control, Partition};

/// A JSON object by `model:routing_group`, sent while it is made: it has an owner in memory at a
/// time.
pub(super) async fn dump(State(face): State<Face>) -> Result<Response, Gone> {
    let partitions = face.ask(Control::Partitions).await?;
    let pieces = Pieces {
        face,
        partitions: partitions.into(),
        current: None,
        is_started: false,
        is_ended: false,
    };
    let body = Body::from_stream(stream::unfold(pieces, |mut pieces| async {
        let piece = pieces.next().await?;
        Some((piece, pieces))
    }));
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// What is still to be sent.
struct Pieces {
    face: Face,
    partitions: VecDeque<Partition>,
    current: Option<Current>,
    is_started: bool,
    is_ended: bool,
}

/// The partition under way.
struct Current {
    pool: usize,
    owners: VecDeque<OwnerId>,
    events: u64,
}

impl Pieces {
    /// `None` at the end. An error breaks the answer off, so that nobody takes it for whole.
    async fn next(&mut self) -> Option<Result<Bytes, Broken>> {
        if let Some(current) = &mut self.current {
            let Some(owner) = current.owners.pop_front() else {
                self.current = None;
                return Some(Ok(Bytes::from_static(b"]}")));
            };
            let pool = current.pool;
            let ask = |reply| Control::Stores { pool, owner, reply };
            let Ok(stores) = self.face.ask(ask).await else {
                return Some(Err(Broken));
            };
            let mut piece = Vec::new();
            for mut store in stores {
                if current.events > 0 {
                    piece.push(b',');
                }
                store.event.event_id = current.events;
                current.events += 1;
                if serde_json::to_writer(&mut piece, &store).is_err() {
                    return Some(Err(Broken));
                }
            }
            return Some(Ok(piece.into()));
        }
        if let Some(partition) = self.partitions.pop_front() {
            let model = partition.models.first().map_or("", String::as_str);
            let key = format!("{model}:{}", partition.group);
            let separator = if self.is_started { "," } else { "{" };
            self.is_started = true;
            self.current = Some(Current {
                pool: partition.pool,
                owners: partition.owners.into(),
                events: 0,
            });
            let (key, size) = (serde_json::Value::from(key), partition.block_size);
            let head = format!("{separator}{key}:{{\"block_size\":{size},\"events\":[");
            return Some(Ok(head.into()));
        }
        if self.is_ended {
            return None;
        }
        self.is_ended = true;
        Some(Ok(Bytes::from_static(if self.is_started {
            b"}"
        } else {
            b"{}"
        })))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the indexer is shutting down")]
struct Broken;
