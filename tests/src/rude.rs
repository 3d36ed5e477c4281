//! A worker that behaves as it is told to, and may go away.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What a worker does with a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// Streams an answer to its end.
    #[default]
    Serve,
    /// Answers with status 500.
    Error,
    /// Resets the connection once it has read the request.
    Reset,
    /// Resets the connection after the first event of the answer.
    Break,
    /// Answers no POST for as long as it is told to.
    Hang,
}

/// Events of an answer.
const EVENTS: u32 = 8;

/// A running worker.
#[derive(Debug)]
pub struct Rude {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it does.
    pub manner: watch::Sender<Manner>,
    /// Requests that it has read.
    pub requests: Arc<AtomicU64>,
    id: u64,
    task: Option<JoinHandle<()>>,
}

impl Rude {
    /// Starts one with this id, with manners.
    pub async fn start(id: u64) -> Self {
        let mut rude = Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            manner: watch::channel(Manner::Serve).0,
            requests: Arc::default(),
            id,
            task: None,
        };
        rude.come_back().await;
        rude
    }

    /// Listens where it did before.
    ///
    /// # Panics
    /// When somebody else listens there.
    pub async fn come_back(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("its port");
        self.address = listener.local_addr().expect("a bound socket");
        let (manner, requests, id) = (self.manner.subscribe(), Arc::clone(&self.requests), self.id);
        self.task = Some(tokio::spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                streams.spawn(serve(stream, manner.clone(), Arc::clone(&requests), id));
            }
        }));
    }

    /// Goes away with all its connections.
    pub async fn go(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            // Its socket is closed once it has ended.
            let _ = task.await;
        }
    }

    /// Requests that it has read.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Rude {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn serve(
    mut stream: TcpStream,
    mut manner: watch::Receiver<Manner>,
    requests: Arc<AtomicU64>,
    id: u64,
) -> std::io::Result<()> {
    while let Some(method) = read_request(&mut stream).await? {
        requests.fetch_add(1, Ordering::Relaxed);
        if method == "post" {
            // A sender that is gone changes nothing any more.
            let _ = manner.wait_for(|manner| *manner != Manner::Hang).await;
        }
        let manner = *manner.borrow();
        match manner {
            Manner::Error => {
                let head = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}";
                stream.write_all(head.as_bytes()).await?;
                continue;
            }
            Manner::Reset => return reset(&stream),
            Manner::Serve | Manner::Break | Manner::Hang => {}
        }
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-worker-id: {id}\r\n\
             transfer-encoding: chunked\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        for _ in 0..EVENTS {
            let event = "data: {\"choices\":[]}\n\n";
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
            if manner == Manner::Break {
                return reset(&stream);
            }
        }
        stream.write_all(b"0\r\n\r\n").await?;
    }
    Ok(())
}

/// Lets a connection be closed so that the peer's next read fails.
fn reset(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_zero_linger()
}

/// Reads a request to its end and returns its method; `None` where there is none any more.
async fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) if head.is_empty() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = head.split("content-length:").nth(1);
    let length = length.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).await?;
    Ok(head.split(' ').next().map(str::to_owned))
}
