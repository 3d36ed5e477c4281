//! Chats of one long message, an answer and a short question, of which no two are the same.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kv_core::rng::Rng;

use crate::cpu;
use crate::http::{Connection, together};
use crate::spread::quantile;

/// Words of the common language that prompts are made of.
const WORDS: &str = "time person year way day thing man world life hand part child eye woman place \
    work week case point government company number group problem fact be have do say get make go \
    know take see come think look want give use find tell ask seem feel try leave call good new \
    first last long great little own other old right big high different small large next early";

/// A size of prompts, and how many are sent in a repeat.
#[derive(Debug)]
pub struct Size {
    /// Words of the long message.
    pub words: usize,
    /// Requests sent one after the other.
    pub alone: usize,
    /// Requests sent over all connections.
    pub together: usize,
}

/// The sizes that are measured.
const SIZES: [Size; 3] = [
    Size {
        words: 64,
        alone: 300,
        together: 1_200,
    },
    Size {
        words: 4_096,
        alone: 60,
        together: 240,
    },
    Size {
        words: 36_000,
        alone: 12,
        together: 60,
    },
];

/// What a request's text has in common with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Cold,
    /// All but the last message.
    NextTurn,
}

/// A request whose every copy is another text.
#[derive(Debug)]
pub struct Request {
    bytes: Vec<u8>,
    /// Where its number stands.
    at: usize,
    next: AtomicU64,
}

const MARK: &str = "0123456789abcdef";

impl Request {
    /// A chat with this model.
    #[must_use]
    pub fn new(model: &str, words: usize, kind: Kind, rng: &mut Rng) -> Self {
        let all: Vec<&str> = WORDS.split_whitespace().collect();
        let text: Vec<&str> = (0..words).map(|_| all[rng.below(all.len())]).collect();
        let text = text.join(" ");
        let (first, last) = match kind {
            Kind::Cold => (format!("{MARK} {text}"), "and then?".to_owned()),
            Kind::NextTurn => (text, format!("and then {MARK}?")),
        };
        let body = format!(
            r#"{{"model":"{model}","max_tokens":1,"messages":[{{"role":"user","content":"{first}"}},{{"role":"assistant","content":"I see."}},{{"role":"user","content":"{last}"}}]}}"#
        );
        let bytes = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        Self {
            at: bytes.find(MARK).unwrap_or_default(),
            bytes: bytes.into_bytes(),
            next: AtomicU64::new(rng.next_u64()),
        }
    }

    /// A text that has not been before, in `buffer`.
    fn write(&self, buffer: &mut Vec<u8>) {
        let number = self
            .next
            .fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        buffer.clone_from(&self.bytes);
        buffer[self.at..self.at + MARK.len()].copy_from_slice(format!("{number:016x}").as_bytes());
    }
}

/// Sends requests one after the other and returns what each took, in microseconds.
fn send(port: u16, request: &Request, count: usize) -> anyhow::Result<Vec<f64>> {
    let mut connection = Connection::open(port)?;
    let mut buffer = Vec::new();
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        request.write(&mut buffer);
        let since = Instant::now();
        connection.send(&buffer)?;
        times.push(since.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// The sizes that are wanted: all, or the one that `KV_BENCH_WORDS` names.
pub fn sizes() -> impl Iterator<Item = &'static Size> {
    let only = std::env::var("KV_BENCH_WORDS").ok();
    SIZES.iter().filter(move |size| {
        only.as_ref()
            .is_none_or(|only| *only == size.words.to_string())
    })
}

/// What requests took that were sent one after the other, and then over several connections.
#[derive(Debug)]
pub struct Taken {
    /// Median of those alone, in microseconds.
    pub alone_us: f64,
    /// CPU time of each process for one of those together, in microseconds.
    pub cpu_us: Vec<f64>,
    /// Rate of those together.
    pub per_second: f64,
}

/// Sends requests to a port, and tells what these processes used for them.
///
/// # Errors
/// When one is not answered well, or a process is gone.
pub fn measure(
    port: u16,
    processes: &[u32],
    size: &Size,
    connections: usize,
    request: &Request,
) -> anyhow::Result<Taken> {
    let mut alone = send(port, request, size.alone)?;
    alone.sort_by(f64::total_cmp);
    let each = (size.together / connections).max(1);
    let (_, spent) = cpu::spent(processes, || {
        together(connections, || send(port, request, each))
    })?;
    let sent = (connections * each) as f64;
    Ok(Taken {
        alone_us: quantile(&alone, 0.5),
        cpu_us: spent.cpu_us.iter().map(|us| us / sent).collect(),
        per_second: sent / spent.seconds,
    })
}
