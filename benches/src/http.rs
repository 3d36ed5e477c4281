//! A keep-alive HTTP/1.1 client on a blocking socket: it takes less of the machine from what is
//! measured than a full client would.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(10);

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A completion request, head and body.
#[must_use]
pub fn request(body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
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
    /// When the answer isn't 200 with a content-length.
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
        let Some(length) = header(&head, "content-length") else {
            bail!("no content-length: {head}");
        };
        let all = head_end + length.parse::<usize>()?;
        while filled < all {
            filled += self.read(filled)?;
        }
        Ok(head)
    }

    fn read(&mut self, at: usize) -> anyhow::Result<usize> {
        let room = self.buffer.get_mut(at..).filter(|room| !room.is_empty());
        let n = self.stream.read(room.context("the answer is too long")?)?;
        ensure!(n > 0, "the connection was closed");
        Ok(n)
    }
}

/// A header of an answer's head.
#[must_use]
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}
