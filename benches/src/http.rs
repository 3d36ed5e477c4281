//! A keep-alive HTTP/1.1 client on a blocking socket: it takes less of the machine from what is
//! measured than a full client would.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Header of a request that names how many events its answer is to have.
pub const EVENTS: &str = "x-bench-events";

/// How every event begins, the one that ends a stream too.
const EVENT: &[u8] = b"data: ";

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A streamed answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streamed {
    /// From the request to the first event, in microseconds.
    pub first_us: f64,
    /// From the request to the end of the answer, in microseconds.
    pub all_us: f64,
    /// Reads of the socket that gave something.
    pub reads: usize,
}

/// A completion request, head and body.
#[must_use]
pub fn request(body: &[u8]) -> Vec<u8> {
    with_header("", body)
}

/// A completion request that names its worker.
#[must_use]
pub fn request_to(worker: u64, body: &[u8]) -> Vec<u8> {
    with_header(&format!("x-worker-instance-id: {worker}\r\n"), body)
}

/// A completion request that the workers of [`crate::sink`] answer with this many events.
#[must_use]
pub fn stream_request(body: &[u8], events: usize) -> Vec<u8> {
    with_header(&format!("{EVENTS}: {events}\r\n"), body)
}

fn with_header(header: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         {header}content-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

impl Connection {
    /// Connects to a port on loopback.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open(port: u16) -> anyhow::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self {
            stream,
            buffer: vec![0; 64 << 10],
        })
    }

    /// Sends a request and reads the whole answer; returns the answer's head.
    ///
    /// # Errors
    /// When the answer isn't 200, or tells neither its length nor its chunks.
    pub fn send(&mut self, request: &[u8]) -> anyhow::Result<String> {
        self.stream.write_all(request)?;
        let mut filled = 0;
        let head_end = loop {
            filled += self.read(filled)?;
            let end = self.buffer[..filled]
                .windows(4)
                .position(|w| w == b"\r\n\r\n");
            if let Some(end) = end {
                break end + 4;
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_end]).into_owned();
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
        match header(&head, "content-length") {
            Some(length) => {
                let all = head_end + length.parse::<usize>()?;
                while filled < all {
                    filled += self.read(filled)?;
                }
            }
            None if header(&head, "transfer-encoding").is_some() => {
                // No answer of one token has an empty line of its own before its end.
                while !self.buffer[..filled].ends_with(b"0\r\n\r\n") {
                    filled += self.read(filled)?;
                }
            }
            None => bail!("no end: {head}"),
        }
        Ok(head)
    }

    /// Sends a request and reads a streamed answer of this many events and the one that ends it.
    ///
    /// # Errors
    /// When the answer isn't 200, in chunks, or has another number of events.
    pub fn stream(&mut self, request: &[u8], events: usize) -> anyhow::Result<Streamed> {
        let since = Instant::now();
        let micros = || since.elapsed().as_secs_f64() * 1e6;
        self.stream.write_all(request)?;
        let (mut filled, mut reads, mut first_us) = (0, 0, None);
        // A head can't end like this: it has no line of a single digit.
        while !self.buffer[..filled].ends_with(b"\r\n0\r\n\r\n") {
            filled += self.read(filled)?;
            reads += 1;
            if first_us.is_none() && count(&self.buffer[..filled], EVENT) > 0 {
                first_us = Some(micros());
            }
        }
        let all_us = micros();
        let answer = &self.buffer[..filled];
        let shown = || String::from_utf8_lossy(answer);
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", shown());
        ensure!(count(answer, EVENT) == events + 1, "{}", shown());
        let first_us = first_us.context("no event")?;
        Ok(Streamed {
            first_us,
            all_us,
            reads,
        })
    }

    fn read(&mut self, at: usize) -> anyhow::Result<usize> {
        let room = self.buffer.get_mut(at..).filter(|room| !room.is_empty());
        let n = self.stream.read(room.context("the answer is too long")?)?;
        ensure!(n > 0, "the connection was closed");
        Ok(n)
    }
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|w| *w == what).count()
}

/// Does the same on several threads at once, a connection each.
///
/// # Errors
/// The first error of any of them.
///
/// # Panics
/// When one of them panics.
pub fn together<T: Send>(
    connections: usize,
    work: impl Fn() -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(&work)).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a client thread"))
            .collect()
    })
}

/// A header of an answer's head.
#[must_use]
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}
