//! What a pool needs, checked.

use std::path::PathBuf;

use ipnet::IpNet;
use kv_core::affinity::Affinity;
use kv_core::delay::Weights;
use kv_core::id::{Role, Slot};
use kv_core::policy::{Mode, Policy, Scoring};
use kv_core::text::Budget;
use kv_core::tracker::Tracking;

use super::fleet::dns;
use super::{Check, milliseconds};
use crate::config::error::Problem;
use crate::config::{CachePolicy, Pool, Tokenizer, TokenizerFrom, file, queue};
use crate::text::tokenizer_file;

impl Check {
    pub(super) fn pool(&mut self, pool: &file::Pool, prefix: &str, tracking: Tracking) -> Pool {
        let path = |key: &str| format!("{prefix}{key}");
        if let Some(other) = self.names.insert(pool.name.clone(), path("name")) {
            self.refuse(path("name"), &pool.name, &format!("is taken by {other}"));
        }
        let lists = [
            ("models", &pool.models),
            ("lora_adapters", &pool.lora_adapters),
        ];
        for (key, list) in lists {
            for (i, model) in list.iter().enumerate() {
                let at = path(&format!("{key}[{i}]"));
                if model.is_empty() {
                    self.refuse(at, "\"\"", "must not be empty");
                } else if let Some(other) = self.served.insert(model.clone(), at.clone()) {
                    self.refuse(at, model, &format!("is served by {other}"));
                }
            }
        }
        let owners: u64 = pool
            .workers
            .iter()
            .map(|w| u64::from(w.data_parallel_size))
            .sum();
        if owners > u64::from(Slot::MAX) {
            let why = format!("must make at most {} owners (workers x ranks)", Slot::MAX);
            self.refuse(path("workers"), owners, &why);
        }
        let takes = |w: &file::Worker| w.role == Role::Aggregated;
        if !pool.workers.is_empty() && !pool.workers.iter().any(takes) {
            let why = "must have a worker of role aggregated: requests are sent whole";
            self.refuse(path("workers"), "[...]", why);
        }
        let workers = pool.workers.iter().enumerate();
        let workers =
            workers.map(|(i, worker)| self.worker(worker, &format!("{prefix}workers[{i}].")));
        let workers = workers.collect();
        let tokenizer = pool.tokenizer.as_ref();
        let tokenizer = tokenizer.map(|t| self.tokenizer(t, &path("tokenizer.path")));
        let media = self.media(pool, prefix);
        let queue = pool.queue.as_ref();
        let queue = queue.and_then(|queue| self.queue(queue, &path("queue")));
        Pool {
            queue,
            overload: queue::overload(pool),
            refusing: queue::refusing(pool),
            tokenizer,
            workers,
            families: self.families(pool, &media, prefix),
            media,
            image_token: pool.image_token_id,
            dns: pool.dns.iter().map(dns).collect(),
            name: pool.name.clone(),
            models: pool.models.clone(),
            lora_adapters: pool.lora_adapters.clone(),
            block_size: pool.kv_cache_block_size,
            policy: Policy {
                tracking,
                ..self.policy(pool, prefix)
            },
            kv_events: pool.kv_events,
            ttl_ms: milliseconds(pool.router_ttl_secs),
            cache_policy: self.cache_policy(pool, prefix),
            predicted_ttl_ms: self.predicted_ttl(pool, prefix),
            routing_group: None,
            trusts_hints: pool.trust_hints,
            trusted_sources: self.trusted_sources(pool, prefix),
            affinity: affinity(pool),
            device_ratio: pool.encoder_cuda_to_cpu_ratio,
            slow_start_ms: u32::try_from(milliseconds(pool.slow_start_secs)).unwrap_or(u32::MAX),
        }
    }

    fn cache_policy(&mut self, pool: &file::Pool, prefix: &str) -> CachePolicy {
        let policy = pool.router_approximate_cache_policy;
        if policy == CachePolicy::Lru && pool.kv_events {
            let at = format!("{prefix}router_approximate_cache_policy");
            self.refuse(
                at,
                "lru",
                "needs kv_events: false: with events, engines say what goes",
            );
        }
        policy
    }

    fn predicted_ttl(&mut self, pool: &file::Pool, prefix: &str) -> Option<u64> {
        let secs = pool.router_predicted_ttl_secs?;
        if !pool.kv_events {
            let at = format!("{prefix}router_predicted_ttl_secs");
            self.refuse(
                at,
                secs,
                "needs kv_events: without them router_ttl_secs is how long",
            );
        }
        Some(milliseconds(secs))
    }

    fn trusted_sources(&mut self, pool: &file::Pool, prefix: &str) -> Vec<IpNet> {
        let mut networks = Vec::new();
        for (i, source) in pool.trusted_sources.iter().enumerate() {
            match source.parse::<IpNet>() {
                Ok(network) => networks.push(network.trunc()),
                Err(_) => {
                    let at = format!("{prefix}trusted_sources[{i}]");
                    self.refuse(at, source, "must be a network such as 10.0.0.0/8");
                }
            }
        }
        networks
    }

    fn tokenizer(&mut self, tokenizer: &file::Tokenizer, at: &str) -> Tokenizer {
        let from = match (&tokenizer.path, tokenizer.engine) {
            (Some(folder), engine) => {
                self.readable(at, Some(&tokenizer_file(folder)));
                if engine.is_some() {
                    self.refuse(at, folder.display(), "excludes engine");
                }
                TokenizerFrom::Folder(folder.clone())
            }
            (None, Some(engine)) => TokenizerFrom::Engine(engine),
            (None, None) => {
                let path = at.to_owned();
                self.problems.push(Problem::Missing { path });
                TokenizerFrom::Folder(PathBuf::new())
            }
        };
        Tokenizer {
            from,
            cache_bytes: tokenizer.cache_bytes,
            budget: Budget {
                base_ms: tokenizer.budget_ms,
                per_thousand_words_ms: tokenizer.budget_ms_per_1000_words,
            },
            handover: tokenizer.hand_over,
        }
    }

    /// Knobs that what the mode kv compares does not have would do nothing.
    fn knobs(&mut self, pool: &file::Pool, prefix: &str) {
        if pool.router_mode == Mode::Kv && pool.policy == Scoring::PredictedDelay {
            let if_set = |weight: f64| (weight > 0.0).then_some(weight);
            let knobs = [
                ("kv_overlap_score_weight", pool.kv_overlap_score_weight),
                ("prefill_load_scale", pool.prefill_load_scale),
                (
                    "decode_active_request_weight",
                    if_set(pool.decode_active_request_weight),
                ),
                (
                    "overlap_score_credit_decay",
                    if_set(pool.overlap_score_credit_decay),
                ),
            ];
            let why = "is of Dynamo's formula alone and takes policy: dynamo, or compat: dynamo";
            for (knob, weight) in knobs {
                if let Some(weight) = weight {
                    self.refuse(format!("{prefix}{knob}"), weight, why);
                }
            }
        }
    }

    fn policy(&mut self, pool: &file::Pool, prefix: &str) -> Policy {
        if let Some(weight) = pool.kv_overlap_score_weight
            && (pool.prefill_load_scale.is_some() || pool.overlap_score_credit.is_some())
        {
            let why = "excludes prefill_load_scale and overlap_score_credit";
            self.refuse(format!("{prefix}kv_overlap_score_weight"), weight, why);
        }
        self.knobs(pool, prefix);
        let defaults = Policy::default();
        let (scale, credit) = match pool.kv_overlap_score_weight {
            Some(0.0) => (0.0, 0.0),
            Some(weight) => (weight, defaults.overlap_score_credit),
            None => (
                pool.prefill_load_scale
                    .unwrap_or(defaults.prefill_load_scale),
                pool.overlap_score_credit
                    .unwrap_or(defaults.overlap_score_credit),
            ),
        };
        Policy {
            mode: pool.router_mode,
            temperature: pool.router_temperature,
            prefill_load_scale: scale,
            overlap_score_credit: credit,
            host_cache_hit_weight: pool.host_cache_hit_weight,
            disk_cache_hit_weight: pool.disk_cache_hit_weight,
            shared_cache_multiplier: pool.shared_cache_multiplier,
            decode_active_request_weight: pool.decode_active_request_weight,
            overlap_score_credit_decay: pool.overlap_score_credit_decay,
            scoring: pool.policy,
            delay: delay(&pool.predicted_delay),
            ..defaults
        }
    }
}

/// How a pool keeps sessions together.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn affinity(pool: &file::Pool) -> Option<Affinity> {
    let ttl = pool.router_session_affinity_ttl_secs?;
    let is_soft = pool.router_session_affinity_mode == file::Stickiness::Soft;
    let headers = pool.session_headers.iter();
    Some(Affinity {
        ttl_s: ttl.ceil() as u32,
        slack: is_soft.then_some(pool.session_affinity_slack),
        headers: headers.map(|name| name.to_ascii_lowercase()).collect(),
    })
}

/// Weights as the core has them.
fn delay(weights: &file::PredictedDelay) -> Weights {
    Weights {
        backlog_floor: weights.backlog_floor,
        waiting: weights.waiting_weight,
        decoding: weights.decoding_weight,
        requests: weights.request_weight,
        band_ms: weights.band_ms,
        prefill_ms_per_token: weights.prefill_ms_per_token,
    }
}
