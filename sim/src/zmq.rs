//! A PUB socket of `ZeroMQ`, as vLLM's event publisher has it: ZMTP 3.0 without security, three
//! frames to a message. Every subscriber gets all topics.

use std::net::SocketAddr;

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

/// Messages that wait for a subscriber; one that is slower misses the oldest.
const QUEUE_MESSAGES: usize = 4096;
const GREETING: usize = 64;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
/// Longest command or subscription that is read, bytes.
const MAX_FRAME: usize = 4096;

/// The sending half.
#[derive(Clone, Debug)]
pub(crate) struct Pub {
    messages: broadcast::Sender<Bytes>,
    address: SocketAddr,
}

impl Pub {
    /// Binds; serves subscribers until stopped.
    pub(crate) async fn bind(
        address: SocketAddr,
        stop: CancellationToken,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (messages, _) = broadcast::channel(QUEUE_MESSAGES);
        let sender = messages.clone();
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let messages = sender.clone();
                tokio::spawn(async move {
                    // A subscriber that leaves is no failure.
                    let _gone = serve(stream, &messages).await;
                });
            }
        }));
        Ok(Self { messages, address })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a message to whoever has subscribed.
    pub(crate) fn send(&self, frames: &[&[u8]]) {
        let mut message = BytesMut::new();
        for (at, frame) in frames.iter().enumerate() {
            let more = if at + 1 < frames.len() { MORE } else { 0 };
            put_frame(&mut message, more, frame);
        }
        // Nobody may have subscribed.
        let _nobody = self.messages.send(message.freeze());
    }
}

async fn serve(mut stream: TcpStream, messages: &broadcast::Sender<Bytes>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // Whoever has been greeted misses nothing.
    let mut news = messages.subscribe();
    let mut hello = BytesMut::with_capacity(GREETING);
    hello.put_u8(0xff);
    hello.put_bytes(0, 8);
    hello.put_slice(&[0x7f, 3, 0]);
    hello.put_slice(b"NULL");
    hello.put_bytes(0, GREETING - hello.len());
    put_frame(
        &mut hello,
        COMMAND,
        b"\x05READY\x0bSocket-Type\0\0\0\x03PUB",
    );
    stream.write_all(&hello).await?;
    stream.read_exact(&mut [0; GREETING]).await?;
    // The other side's greeting is over, and it has subscribed.
    read_frame(&mut stream).await?;
    read_frame(&mut stream).await?;
    let (mut from, mut to) = stream.into_split();
    let further = async { while read_frame(&mut from).await.is_ok() {} };
    let sending = async {
        loop {
            match news.recv().await {
                Ok(message) => to.write_all(&message).await?,
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            }
        }
    };
    tokio::select! {
        () = further => Ok(()),
        sent = sending => sent,
    }
}

fn put_frame(out: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => out.put_slice(&[flags, length]),
        Err(_) => {
            out.put_u8(flags | LONG);
            out.put_u64(body.len() as u64);
        }
    }
    out.put_slice(body);
}

async fn read_frame(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let flags = from.read_u8().await?;
    let length = if flags & LONG == 0 {
        usize::from(from.read_u8().await?)
    } else {
        usize::try_from(from.read_u64().await?).unwrap_or(usize::MAX)
    };
    if length > MAX_FRAME {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).await?;
    Ok(body)
}
