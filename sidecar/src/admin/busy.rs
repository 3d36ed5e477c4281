//! `/busy_threshold`: past which load workers take no requests, read and set at run time as in
//! Dynamo's frontend.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kv_core::queue::Thresholds;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Admin;
use super::error::AdminError;
use crate::index::Control;

/// Thresholds of a model. Those left out in a request stay as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Busy {
    model: String,
    active_decode_blocks_threshold: Option<f64>,
    active_prefill_tokens_threshold: Option<u64>,
    active_prefill_tokens_threshold_frac: Option<f64>,
}

impl Busy {
    fn new(model: String, thresholds: Thresholds) -> Self {
        Self {
            model,
            active_decode_blocks_threshold: thresholds.decode_blocks,
            active_prefill_tokens_threshold: thresholds.prefill_tokens,
            active_prefill_tokens_threshold_frac: thresholds.prefill_share,
        }
    }

    /// What is wrong with them, if anything is.
    fn fault(&self) -> Option<String> {
        let share = self.active_decode_blocks_threshold;
        if let Some(share) = share.filter(|share| !(0.0..=1.0).contains(share)) {
            let what = "active_decode_blocks_threshold must be between 0 and 1";
            return Some(format!("{what}, not {share}"));
        }
        let share = self.active_prefill_tokens_threshold_frac;
        let share = share.filter(|share| !(share.is_finite() && *share >= 0.0))?;
        let what = "active_prefill_tokens_threshold_frac must not be below 0";
        Some(format!("{what}, but is {share}"))
    }
}

pub(super) async fn list(State(admin): State<Admin>) -> Result<Response, AdminError> {
    let all = admin.ask(Control::Thresholds).await?;
    let all = all.into_iter();
    let all: Vec<Busy> = all.map(|(model, set)| Busy::new(model, set)).collect();
    Ok(Json(json!({ "thresholds": all })).into_response())
}

pub(super) async fn post(
    State(admin): State<Admin>,
    body: Result<Json<Busy>, JsonRejection>,
) -> Result<Response, AdminError> {
    let busy = match body {
        Ok(Json(busy)) => busy,
        Err(rejection) => return Ok(refuse(rejection.status(), &rejection.body_text())),
    };
    if let Some(fault) = busy.fault() {
        return Ok(refuse(StatusCode::BAD_REQUEST, &fault));
    }
    let change = Thresholds {
        decode_blocks: busy.active_decode_blocks_threshold,
        prefill_tokens: busy.active_prefill_tokens_threshold,
        prefill_share: busy.active_prefill_tokens_threshold_frac,
    };
    let model = busy.model.clone();
    let ask = |reply| Control::Threshold {
        model,
        change,
        reply,
    };
    let Some(set) = admin.ask(ask).await? else {
        if change.is_unset() {
            return Ok(Json(Busy::new(busy.model, Thresholds::default())).into_response());
        }
        let what = format!("no pool serves the model {:?}", busy.model);
        return Ok(refuse(StatusCode::NOT_FOUND, &what));
    };
    Ok(Json(Busy::new(busy.model, set)).into_response())
}

/// An error as Dynamo's frontend has it.
fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}
