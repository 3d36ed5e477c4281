//! Prompts that are text: asking the sidecar for their blocks while the request waits.
//!
//! The wait is bounded by the pool's budget, whatever becomes of the sidecar: Envoy ends the call
//! then, and a tick a question on the stream ([`crate::inquiries`]). The root context asks either way,
//! so that a client which leaves meanwhile leaves nothing behind.

use std::borrow::Cow;

use kv_core::chunk::Chunks;
use kv_core::holdings::Named;
use kv_core::policy::Mode;
use kv_core::scan::Scan;
use kv_core::surface::Surface;
use kv_core::text::{Answer, Ask, Extent, LONGEST_BODY, METHOD, Refusal, SERVICE, Wanted};

use crate::host::{Host, Method, Token};
use crate::metrics::{Event, Fault};
use crate::reason::Reason;
use crate::vm::Router;

/// The call.
const READ: Method = Method {
    service: SERVICE,
    method: METHOD,
};
/// Values of a body that chat templates put before the messages.
const BESIDE: [&str; 6] = [
    "system",
    "instructions",
    "tools",
    "documents",
    "chat_template_kwargs",
    "reasoning_effort",
];

/// What to ask about.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The request's context, and the root context it belongs to.
    pub contexts: (u32, u32),
    /// The API.
    pub surface: Surface,
    /// The pool, where it is named.
    pub pool: Option<&'a str>,
    /// Bytes of the body.
    pub bytes: usize,
    /// What it said.
    pub scan: &'a Scan,
    /// Its cache salt.
    pub salt: &'a str,
}

impl<'a> Question<'a> {
    fn model(&self) -> Option<&'a str> {
        self.scan.model.value().map(String::as_str)
    }
}

/// How a question went out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By a call of its own.
    Call(Token),
    /// On the stream, under this number.
    Stream(u64),
}

/// A question under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    way: Way,
    since_ns: u64,
    budget_ns: u64,
}

/// What has become of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// How far the prompt is known, or why not.
    pub reason: Reason,
    /// Tokens of the prompt, 0 where unknown.
    pub tokens: u32,
    /// Sequence hashes of its blocks.
    pub hashes: Vec<u64>,
    /// Its blocks in the pool's further families.
    pub families: Vec<Named>,
    /// Its token ids as a JSON array, where they are to be handed over.
    pub ids: Vec<u8>,
}

impl Told {
    fn nothing(reason: Reason) -> Self {
        Self {
            reason,
            tokens: 0,
            hashes: Vec::new(),
            families: Vec::new(),
            ids: Vec::new(),
        }
    }
}

impl<H: Host> Router<H> {
    /// The chunks of a text, in a pool that finds texts by them.
    pub fn chunks(&self, question: &Question<'_>) -> Option<Chunks> {
        let fleet = self.world.fleet()?;
        let served = fleet.serve(question.pool, question.model())?;
        if !served.pool.chunks || served.pool.policy.mode != Mode::Kv {
            return None;
        }
        let members = &question.scan.members;
        let value = |key: &str| {
            let place = members.get(key);
            place.map_or_else(Vec::new, |place| {
                self.host.body(place.start, place.len().min(LONGEST_BODY))
            })
        };
        let text = value(question.surface.prompt_key()?);
        let beside = BESIDE.map(value);
        let seed = served.hashing(question.salt).seed;
        Some(Chunks::of(&text, &beside, served.pool.block_size, seed))
    }

    /// Asks the sidecar.
    ///
    /// # Errors
    /// The reason why it is not asked.
    pub fn ask(&mut self, question: &Question<'_>) -> Result<Asked, Reason> {
        let fleet = self.world.fleet().ok_or(Reason::Text)?;
        let served = fleet
            .serve(question.pool, question.model())
            .ok_or(Reason::Text)?;
        let budget = served.pool.text.ok_or(Reason::Text)?;
        if served.pool.policy.mode != Mode::Kv {
            return Err(Reason::Text);
        }
        if question.bytes > LONGEST_BODY {
            return Err(Reason::TooLong);
        }
        let host = &self.host;
        let body = host.body(0, question.bytes);
        if body.len() != question.bytes {
            self.metrics.fault(host, Fault::Body);
            return Err(Reason::TextFailed);
        }
        let budget_us = budget.of(body.len());
        let ask = Ask {
            pool: &served.pool.name,
            surface: question.surface,
            block_size: served.pool.block_size,
            seed: served.hashing(question.salt).seed.0,
            budget_us,
            body: &body,
        };
        let wanted = Wanted {
            families: Cow::Borrowed(&served.pool.families),
            lora: served.lora,
            salt: question.salt,
            ids: served.pool.handover.takes(question.surface),
        };
        let since_ns = host.now_ns();
        let budget_ns = 1_000 * budget_us;
        let (request, root) = question.contexts;
        let number = self.inquiries.number(body.len()).filter(|number| {
            let message = ask.encode_numbered(*number, &wanted);
            let deadline_ns = since_ns.saturating_add(budget_ns);
            self.inquiries.ask(host, request, &message, deadline_ns)
        });
        let way = match number {
            Some(number) => Way::Stream(number),
            None => {
                self.metrics.count(host, Event::TextCall, 1);
                let message = ask.encode(&wanted);
                let timeout_ms = budget_us.div_ceil(1_000);
                let token = host
                    .enter(root)
                    .then(|| host.call(&self.cluster, READ, &message, timeout_ms));
                host.enter(request);
                Way::Call(token.flatten().ok_or(Reason::TextFailed)?)
            }
        };
        Ok(Asked {
            way,
            since_ns,
            budget_ns,
        })
    }
}

impl Asked {
    /// Whether this is how it went out.
    #[must_use]
    pub fn is(&self, way: Way) -> bool {
        self.way == way
    }

    /// When it was asked.
    #[must_use]
    pub fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// Understands the answer; `None` where the call has failed or taken too long.
    #[must_use]
    pub fn understand(&self, message: Option<&[u8]>, now_ns: u64) -> Told {
        let Some(message) = message else {
            // Envoy gives the same status for a call that it ended as for one that failed.
            // Its timer may have begun a little before the call.
            let waited_ns = now_ns.saturating_sub(self.since_ns);
            let is_late = waited_ns >= self.budget_ns / 4 * 3;
            let reason = if is_late {
                Reason::TextLate
            } else {
                Reason::TextFailed
            };
            return Told::nothing(reason);
        };
        match Answer::decode(message) {
            Err(_) => Told::nothing(Reason::TextFailed),
            Ok((Answer::Refused(refusal), _)) => Told::nothing(match refusal {
                Refusal::NoTokenizer => Reason::Text,
                Refusal::Template | Refusal::Malformed => Reason::TextRefused,
                Refusal::Overloaded => Reason::TextOverloaded,
                Refusal::Deadline => Reason::TextLate,
                Refusal::Engine => Reason::TextFailed,
            }),
            Ok((Answer::Read(blocks), further)) => Told {
                reason: match blocks.extent {
                    Extent::Whole => Reason::Kv,
                    Extent::Deadline => Reason::KvBeginning,
                    Extent::Media => Reason::KvBeforeMedia,
                },
                tokens: blocks.tokens,
                hashes: blocks.hashes(),
                families: further.families,
                ids: further.ids.to_vec(),
            },
        }
    }
}
