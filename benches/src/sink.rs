//! Workers that take requests and answer at once, on blocking sockets.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use crate::http::header;

/// Header of an answer that names the worker.
pub const WORKER: &str = "x-worker-id";

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
        let length = header(&head, "content-length").and_then(|n| n.parse::<usize>().ok());
        let mut left = length.unwrap_or(0).saturating_sub(filled - end);
        while left > 0 {
            match stream.read(&mut buffer) {
                Ok(n) if n > 0 => left = left.saturating_sub(n),
                _ => return,
            }
        }
        // Clients here never send a request before they have the answer to the one before.
        filled = 0;
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}
