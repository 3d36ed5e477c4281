//! Token ids of models whose files are not here: an engine of the pool is asked.
//!
//! What engines answer is remembered by the whole question, so only a prompt that comes again costs
//! nothing; no part of one is known to have the ids of the part.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kv_core::surface::Surface;
use quick_cache::sync::Cache;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::body::{BodyError, Prompt};
use super::cached::{Encoded, Ids, Weight};
use crate::config::EngineFace;

/// Longest answer, in bytes: a million ids and room to spare.
const ANSWER_BYTES: usize = 16 << 20;
/// Engines that are asked about one prompt, at most.
const TRIES: usize = 2;
/// Keys of a chat that `/tokenize` takes as they are.
const CHAT_KEYS: [&str; 7] = [
    "model",
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template_kwargs",
];
/// Keys of a chat that change its prompt and that `/tokenize` doesn't take.
const UNTOLD_KEYS: [&str; 3] = ["documents", "chat_template_args", "reasoning_effort"];

/// Why an engine has not told the ids of a prompt.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The body makes no sense, or engines can't be asked about it.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// Nobody is there to be asked.
    #[error("no worker to ask")]
    Nobody,
    /// The engine refuses the prompt.
    #[error("{worker} refuses the prompt: {status}")]
    Refused {
        /// The engine.
        worker: SocketAddr,
        /// Its status, below 500.
        status: StatusCode,
    },
    /// The engine can't be reached, fails or answers rubbish.
    #[error("{worker}: {why}")]
    Failed {
        /// The engine.
        worker: SocketAddr,
        /// What is wrong.
        why: String,
    },
}

/// The engines of a pool as a tokenizer.
pub struct Engine {
    face: EngineFace,
    client: Client<HttpConnector, Full<Bytes>>,
    workers: RwLock<Arc<[SocketAddr]>>,
    turn: AtomicUsize,
    known: Cache<u128, Ids, Weight>,
    /// Secret: prompts can't be made to meet in one hash.
    seed: u64,
}

impl Engine {
    /// Asks these workers, and remembers as many ids as fit into `bytes`.
    #[must_use]
    pub fn new(face: EngineFace, workers: Vec<SocketAddr>, bytes: u64, seed: u64) -> Self {
        let items = usize::try_from(bytes / 4096).unwrap_or(usize::MAX);
        Self {
            face,
            client: Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(8)
                .build_http(),
            workers: RwLock::new(workers.into()),
            turn: AtomicUsize::new(0),
            known: Cache::with_weighter(items.max(16), bytes, Weight),
            seed,
        }
    }

    /// From here on these workers are asked.
    pub fn ask_workers(&self, workers: Vec<SocketAddr>) {
        let mut known = self.workers.write().unwrap_or_else(PoisonError::into_inner);
        *known = workers.into();
    }

    /// Bytes that are remembered.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.known.weight()
    }

    /// Ids of a body's prompt; none where something stands in it that is no text.
    ///
    /// # Errors
    /// When no engine tells them.
    pub async fn ids(&self, surface: Surface, body: &[u8]) -> Result<Option<Encoded>, EngineError> {
        let Some((path, question)) = self.question(surface, body)? else {
            return Ok(None);
        };
        let key = xxh3_128_with_seed(&[path.as_bytes(), b"\0", &question].concat(), self.seed);
        if let Some(ids) = self.known.get(&key) {
            return Ok(Some(Encoded {
                ids: ids.to_vec(),
                complete: true,
                remembered: ids.len(),
            }));
        }
        let workers = {
            let known = self.workers.read().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&known)
        };
        let question = Bytes::from(question);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let from_turn =
            (0..workers.len().min(TRIES)).map(|n| workers.get((turn + n) % workers.len()));
        let mut last = EngineError::Nobody;
        for worker in from_turn.flatten() {
            match self.exchange(*worker, path, question.clone()).await {
                Ok(ids) => {
                    self.known.insert(key, ids.as_slice().into());
                    return Ok(Some(Encoded {
                        ids,
                        complete: true,
                        remembered: 0,
                    }));
                }
                Err(error @ EngineError::Failed { .. }) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// What to ask, and where.
    fn question(
        &self,
        surface: Surface,
        body: &[u8],
    ) -> Result<Option<(&'static str, Vec<u8>)>, EngineError> {
        let prompt = Prompt::parse(surface, body)?;
        if matches!(&prompt, Prompt::Chat(chat) if chat.has_media()) {
            return Ok(None);
        }
        if self.face == EngineFace::Render {
            let path = match surface {
                Surface::Completions => "/v1/completions/render",
                Surface::Chat => "/v1/chat/completions/render",
                _ => return Err(BodyError::Unknown("the path").into()),
            };
            return Ok(Some((path, body.to_vec())));
        }
        let mut fields: Map<String, Value> =
            serde_json::from_slice(body).map_err(BodyError::from)?;
        let question = match prompt {
            Prompt::Text { text, special } => {
                json!({"model": fields.get("model"), "prompt": text, "add_special_tokens": special})
            }
            Prompt::Chat(_) if surface == Surface::Chat => {
                if UNTOLD_KEYS.iter().any(|key| fields.contains_key(*key)) {
                    return Err(BodyError::Unknown("a key that only chats have").into());
                }
                fields.retain(|key, _| CHAT_KEYS.contains(&key.as_str()));
                Value::Object(fields)
            }
            Prompt::Chat(chat) => {
                let chat = chat.into_chat(false);
                let mut question = json!({"model": fields.get("model"), "messages": chat.messages});
                if chat.tools.is_true() {
                    question["tools"] = json!(chat.tools);
                }
                question
            }
        };
        Ok(Some(("/tokenize", question.to_string().into_bytes())))
    }

    async fn exchange(
        &self,
        worker: SocketAddr,
        path: &str,
        question: Bytes,
    ) -> Result<Vec<u32>, EngineError> {
        let failed = |why: &dyn std::fmt::Display| EngineError::Failed {
            worker,
            why: why.to_string(),
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{worker}{path}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(question))
            .map_err(|e| failed(&e))?;
        let answer = self.client.request(request).await.map_err(|e| failed(&e))?;
        let status = answer.status();
        // An engine without such a path is none that refuses.
        if status.is_client_error() && status != StatusCode::NOT_FOUND {
            return Err(EngineError::Refused { worker, status });
        }
        if !status.is_success() {
            return Err(failed(&status));
        }
        let body = Limited::new(answer.into_body(), ANSWER_BYTES);
        let body = body.collect().await.map_err(|e| failed(&e))?.to_bytes();
        let ids = serde_json::from_slice(&body).ok().and_then(ids_in);
        ids.ok_or_else(|| failed(&"an answer without token ids"))
    }
}

/// An answer: `/tokenize` has the ids as `tokens`, rendered prompts have them as `token_ids` or
/// `prompt_token_ids`, some in lists and beside the conversation.
#[derive(Deserialize)]
struct Told {
    #[serde(alias = "token_ids", alias = "prompt_token_ids")]
    tokens: Vec<u32>,
}

/// The first list of ids; the lists around it nest two deep at most.
fn ids_in(answer: &RawValue) -> Option<Vec<u32>> {
    fn within(raw: &RawValue, deep: u8) -> Option<Vec<u32>> {
        if let Ok(Told { tokens }) = serde_json::from_str(raw.get()) {
            return Some(tokens);
        }
        let deeper = deep.checked_sub(1)?;
        let items: Vec<&RawValue> = serde_json::from_str(raw.get()).ok()?;
        items.into_iter().find_map(|item| within(item, deeper))
    }
    within(answer, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(face: EngineFace) -> Engine {
        Engine::new(face, Vec::new(), 1 << 20, 1)
    }

    fn asked(face: EngineFace, surface: Surface, body: &str) -> (&'static str, Value) {
        let question = engine(face).question(surface, body.as_bytes());
        let (path, question) = question.unwrap().unwrap();
        (path, serde_json::from_slice(&question).unwrap())
    }

    #[test]
    fn an_engine_is_asked_about_the_prompt_alone() {
        let body =
            r#"{"model":"m","max_tokens":7,"tools":[],"messages":[{"role":"user","content":"a"}]}"#;
        let (path, question) = asked(EngineFace::Tokenize, Surface::Chat, body);
        let messages = json!([{"role": "user", "content": "a"}]);
        assert_eq!(path, "/tokenize");
        assert_eq!(
            question,
            json!({"model": "m", "tools": [], "messages": messages})
        );
        let (_, question) = asked(
            EngineFace::Tokenize,
            Surface::Generate,
            r#"{"text":"a","sampling_params":{}}"#,
        );
        assert_eq!(
            question,
            json!({"model": null, "prompt": "a", "add_special_tokens": true})
        );
        let (_, question) = asked(EngineFace::Tokenize, Surface::Responses, r#"{"input":"a"}"#);
        assert_eq!(question, json!({"model": null, "messages": messages}));
        let (path, _) = asked(EngineFace::Render, Surface::Chat, body);
        assert_eq!(path, "/v1/chat/completions/render");
    }

    #[test]
    fn what_engines_cannot_be_asked_about_is_left_out() {
        let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        let question = engine(EngineFace::Render).question(Surface::Chat, image.as_bytes());
        assert!(question.unwrap().is_none());
        let documents = r#"{"messages":[],"documents":[]}"#;
        let question = engine(EngineFace::Tokenize).question(Surface::Chat, documents.as_bytes());
        assert!(question.is_err());
        let input = r#"{"input":"a"}"#;
        let question = engine(EngineFace::Render).question(Surface::Responses, input.as_bytes());
        assert!(question.is_err());
    }

    #[test]
    fn ids_are_found_in_every_form_of_answer() {
        let found = |text: &str| ids_in(serde_json::from_str(text).unwrap());
        for answer in [
            r#"{"count":2,"max_model_len":9,"tokens":[1,2]}"#,
            r#"{"kind":"chat","token_ids":[1,2]}"#,
            r#"[{"prompt_token_ids":[1,2]}]"#,
            r#"[[{"role":"user","content":"a"}],[{"prompt_token_ids":[1,2]}]]"#,
        ] {
            assert_eq!(found(answer), Some(vec![1, 2]), "{answer}");
        }
        for answer in [
            "{}",
            "[]",
            "7",
            r#"{"tokens":["a"]}"#,
            "[[[{\"tokens\":[1]}]]]",
        ] {
            assert_eq!(found(answer), None, "{answer}");
        }
    }
}
