//! A request whose body is being read.

use kv_core::scan::{Field, Prompt, Scanner};
use kv_core::surface::{NVEXT, Surface, TOKEN_DATA};

use super::read::Read;
use crate::header_map::HeaderMap;
use crate::hints::Nvext;
use crate::host::Host;
use crate::metrics::Fault;
use crate::reason::Reason;
use crate::vm::Router;

/// What has come of it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) since_ns: u64,
    /// When the body part at hand came.
    pub(super) part_ns: u64,
    pub(super) surface: Surface,
    pub(super) body_limit: usize,
    pub(super) token_limit: u32,
    pub(super) scanner: Scanner,
    /// Body bytes taken.
    pub(super) taken: usize,
    /// Whether Envoy handed out all bytes it announced.
    pub(super) whole: bool,
    pub(super) headers: HeaderMap,
    /// The pool, where it is named.
    pub(super) pool: Option<String>,
}

impl Held {
    /// Takes the bytes of the body that are not taken yet.
    pub(super) fn take<H: Host>(&mut self, router: &mut Router<H>, size: usize) {
        let wanted = size.saturating_sub(self.taken);
        if wanted == 0 || !self.whole {
            return;
        }
        let part = router.host.body(self.taken, wanted);
        if part.len() != wanted {
            self.whole = false;
            router.metrics.fault(&router.host, Fault::Body);
            return;
        }
        self.taken = size;
        self.scanner.feed(&part);
        let fleet = router.world.fleet();
        let hashing =
            fleet.and_then(|fleet| fleet.hashing(self.pool.as_deref(), self.scanner.so_far()));
        if let Some(hashing) = hashing {
            self.scanner.hash(hashing);
        }
    }

    /// What a body that was not read to its end said: at most the pool.
    pub(super) fn cut(self, reason: Reason) -> Read {
        let mut read = Read::nothing(reason, self.headers, self.pool);
        read.scan.model = self.scanner.so_far().model.clone();
        read
    }

    /// What the complete body said.
    pub(super) fn read(self, host: &impl Host) -> Read {
        let (limit, bytes) = (self.scanner.limit(), self.taken);
        let scan = self.scanner.finish();
        let (true, Ok(mut scan)) = (self.whole, scan) else {
            return Read::nothing(Reason::BadJson, self.headers, self.pool);
        };
        let mut nvext = Nvext::default();
        if let Some(place) = scan.members.get(NVEXT) {
            let json = host.body(place.start, place.len());
            let mut scanner = Scanner::of(limit, Some(TOKEN_DATA));
            scanner.feed(&json);
            // Where it makes no sense, that is for the worker to judge.
            let within = scanner.finish().unwrap_or_default();
            nvext = Nvext::read(&json, &within.members);
            let is_prompt = matches!(within.prompt, Prompt::Tokens(_) | Prompt::TooManyTokens);
            if is_prompt && self.surface.takes_token_data() {
                scan.prompt = within.prompt;
            }
        }
        let text_key = self.surface.text_key();
        let has_text = text_key.is_some_and(|key| scan.members.get(key).is_some());
        let (reason, tokens) = match &scan.prompt {
            _ if self.surface == Surface::Embeddings => (Reason::NoReuse, 0),
            Prompt::Tokens(tokens) => {
                let count = u32::try_from(tokens.ids().len()).unwrap_or(u32::MAX);
                (Reason::Kv, count)
            }
            // At least that many, and an owner that gets them is busy.
            Prompt::TooManyTokens => (Reason::TooManyTokens, self.token_limit),
            Prompt::Text => (Reason::Text, 0),
            Prompt::Absent if has_text => (Reason::Text, 0),
            Prompt::Absent | Prompt::Unsupported => (Reason::NoPrompt, 0),
        };
        // Hashed without its salt, a prompt would match what it can't use.
        let readable_salt = matches!(scan.cache_salt, Field::Absent | Field::Value(_));
        let reason = match reason {
            Reason::Kv | Reason::Text if !readable_salt => Reason::NoPrompt,
            reason => reason,
        };
        Read {
            reason,
            tokens,
            scan,
            hashes: Vec::new(),
            families: Vec::new(),
            is_complete: true,
            bytes,
            changed: None,
            headers: self.headers,
            pool: self.pool,
            nvext,
            hints: None,
        }
    }
}
