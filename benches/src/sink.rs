//! Workers that take requests and answer, on blocking sockets: at once, or as a stream of events
//! where the request asks for one.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::http::{EVENTS, header};

/// Header of an answer that names the worker.
pub const WORKER: &str = "x-worker-id";

/// Time between two events: long enough that a proxy reads each by itself.
pub const GAP: Duration = Duration::from_millis(1);

/// An event of one token, as engines write it.
const TOKEN: &str = "data: {\"id\":\"cmpl-0123456789abcdef\",\"object\":\"text_completion\",\
    \"created\":1700000000,\"model\":\"sim\",\"choices\":[{\"index\":0,\"text\":\" token\",\
    \"logprobs\":null,\"finish_reason\":null}]}\n\n";

/// What ends a stream: the last event and the last chunk.
const DONE: &str = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

/// Starts workers `1..=count` for the life of the process and returns where they listen.
///
/// # Errors
/// When no port is free.
pub fn start(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    (1..=count)
        .map(|id| {
            let listener = TcpListener::bind(("127.0.0.1", 0))?;
            let address = listener.local_addr()?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || serve(stream, id));
                }
            });
            Ok(address)
        })
        .collect()
}

/// Answers requests until the connection ends.
fn serve(mut stream: TcpStream, id: usize) {
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{WORKER}: {id}\r\n\
         content-length: 2\r\n\r\n{{}}"
    );
    let mut buffer = vec![0; 128 << 10];
    let mut filled = 0;
    if stream.set_nodelay(true).is_err() {
        return;
    }
    loop {
        let end = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n");
        let Some(end) = end.map(|end| end + 4) else {
            match stream.read(&mut buffer[filled..]) {
                Ok(n) if n > 0 => filled += n,
                _ => return,
            }
            continue;
        };
        let head = String::from_utf8_lossy(&buffer[..end]);
        let number = |name| header(&head, name).and_then(|n| n.parse::<usize>().ok());
        let (length, events) = (number("content-length"), number(EVENTS));
        let mut left = length.unwrap_or(0).saturating_sub(filled - end);
        while left > 0 {
            match stream.read(&mut buffer) {
                Ok(n) if n > 0 => left = left.saturating_sub(n),
                _ => return,
            }
        }
        // Clients here never send a request before they have the answer to the one before.
        filled = 0;
        let written = match events {
            Some(events) => write_events(&mut stream, id, events),
            None => stream.write_all(answer.as_bytes()),
        };
        if written.is_err() {
            return;
        }
    }
}

/// Writes each event by itself, [`GAP`] apart: the head goes with the first, the end with the last.
fn write_events(stream: &mut TcpStream, id: usize, events: usize) -> io::Result<()> {
    let chunk = format!("{:x}\r\n{TOKEN}\r\n", TOKEN.len());
    let mut next = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{WORKER}: {id}\r\n\
         transfer-encoding: chunked\r\n\r\n{chunk}"
    );
    for _ in 1..events {
        stream.write_all(next.as_bytes())?;
        thread::sleep(GAP);
        next.clone_from(&chunk);
    }
    next.push_str(DONE);
    stream.write_all(next.as_bytes())
}
