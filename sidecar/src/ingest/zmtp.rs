//! ZMTP 3.0, the protocol of ZMQ, as far as a subscriber and a dealer need it (rfc.zeromq.org/spec/23):
//! TCP, no security.
//!
//! The peer's numbers are bounded here before anything is allocated, and a connection never mends
//! itself: what comes over another one may be of another engine.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_util::codec::{Decoder, Encoder, Framed};

/// How long connecting and the handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Silence after which the peer's host is asked for a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Frames of one message.
const FRAMES: usize = 8;
/// Bytes of a handshake's command.
const COMMAND_BYTES: usize = 1 << 12;

const GREETING_BYTES: usize = 64;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a connection is of no use, or no more.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// The system says so.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No connection, or no handshake, in time.
    #[error("no answer within {} s", HANDSHAKE.as_secs())]
    Timeout,
    /// The peer has closed the connection.
    #[error("closed by the peer")]
    Closed,
    /// The peer speaks something else.
    #[error("the peer does not speak zmtp 3: {0}")]
    Protocol(&'static str),
    /// A message beyond the limit.
    #[error("a message of more than {limit} bytes or {FRAMES} frames")]
    TooLarge {
        /// Most bytes of a message.
        limit: usize,
    },
}

impl ZmtpError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io(_) | Self::Timeout => "failed",
            Self::Closed => "closed",
            Self::Protocol(_) => "protocol",
            Self::TooLarge { .. } => "too_large",
        }
    }
}

/// What a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes what a PUB socket publishes.
    Sub,
    /// Asks a ROUTER socket.
    Dealer,
}

impl Role {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Sub => b"SUB",
            Self::Dealer => b"DEALER",
        }
    }
}

/// A connection to one peer.
#[derive(Debug)]
pub struct Connection {
    framed: Framed<TcpStream, Codec>,
}

impl Connection {
    /// Connects to `host:port`; messages above `limit` bytes will end the connection.
    ///
    /// # Errors
    /// When that is not possible in time, or the peer is no ZMQ socket without security.
    pub async fn open(address: &str, role: Role, limit: usize) -> Result<Self, ZmtpError> {
        let opening = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE)
                .with_interval(KEEPALIVE / 2)
                .with_retries(3);
            SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
            let mut connection = Self {
                framed: Framed::new(stream, Codec::new(limit)),
            };
            connection.handshake(role).await?;
            Ok(connection)
        };
        let opened = tokio::time::timeout(HANDSHAKE, opening).await;
        opened.unwrap_or(Err(ZmtpError::Timeout))
    }

    async fn handshake(&mut self, role: Role) -> Result<(), ZmtpError> {
        self.framed.send(Unit::Greeting).await?;
        let Unit::Greeting = self.unit().await? else {
            return Err(ZmtpError::Protocol("no greeting"));
        };
        let mut ready = BytesMut::from(&b"\x05READY"[..]);
        property(&mut ready, b"Socket-Type", role.name());
        if role == Role::Dealer {
            property(&mut ready, b"Identity", b"");
        }
        self.framed.send(Unit::Command(ready.freeze())).await?;
        match self.unit().await? {
            Unit::Command(command) if command.starts_with(b"\x05READY") => Ok(()),
            _ => Err(ZmtpError::Protocol("not ready")),
        }
    }

    /// Asks a PUB socket for messages whose first frame starts with `topic`.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn subscribe(&mut self, topic: &str) -> Result<(), ZmtpError> {
        let mut subscription = BytesMut::from(&[1][..]);
        subscription.put_slice(topic.as_bytes());
        self.send(vec![subscription.freeze()]).await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&mut self, frames: Vec<Bytes>) -> Result<(), ZmtpError> {
        self.framed.send(Unit::Message(frames)).await
    }

    /// The next message. Nothing is lost when this is dropped before it is done.
    ///
    /// # Errors
    /// When the connection is gone or the message too large; there is no next one then.
    pub async fn receive(&mut self) -> Result<Vec<Bytes>, ZmtpError> {
        loop {
            match self.unit().await? {
                Unit::Message(frames) => return Ok(frames),
                Unit::Command(command) => self.answer(&command).await?,
                Unit::Greeting => return Err(ZmtpError::Protocol("a second greeting")),
            }
        }
    }

    /// A PING wants its context back; other commands want nothing.
    async fn answer(&mut self, command: &Bytes) -> Result<(), ZmtpError> {
        let Some(rest) = command.strip_prefix(b"\x04PING") else {
            return Ok(());
        };
        let mut pong = BytesMut::from(&b"\x04PONG"[..]);
        pong.put_slice(rest.get(2..).unwrap_or_default());
        self.framed.send(Unit::Command(pong.freeze())).await
    }

    async fn unit(&mut self) -> Result<Unit, ZmtpError> {
        self.framed.next().await.unwrap_or(Err(ZmtpError::Closed))
    }
}

fn property(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.put_slice(name);
    out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
    out.put_slice(value);
}

/// What goes over a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The first 64 bytes of each side.
    Greeting,
    /// What sockets tell each other.
    Command(Bytes),
    /// What programs tell each other, in frames.
    Message(Vec<Bytes>),
}

/// Bytes of a connection to and from units. After an error there is no next one.
#[derive(Debug)]
pub struct Codec {
    limit: usize,
    is_greeted: bool,
    /// Frames of a message whose last has not come.
    frames: Vec<Bytes>,
    bytes: usize,
}

impl Codec {
    /// A codec of a connection that has not begun; messages have at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            is_greeted: false,
            frames: Vec::new(),
            bytes: 0,
        }
    }

    fn greeting(&mut self, from: &mut BytesMut) -> Result<Option<Unit>, ZmtpError> {
        if from.first().is_some_and(|first| *first != 0xff) {
            return Err(ZmtpError::Protocol("no signature"));
        }
        if from.len() < GREETING_BYTES {
            return Ok(None);
        }
        let greeting = from.split_to(GREETING_BYTES);
        if greeting[9] != 0x7f {
            return Err(ZmtpError::Protocol("no signature"));
        }
        if greeting[10] < 3 {
            return Err(ZmtpError::Protocol("an older version"));
        }
        if !greeting[12..32].starts_with(b"NULL\0") {
            return Err(ZmtpError::Protocol("it wants security"));
        }
        self.is_greeted = true;
        Ok(Some(Unit::Greeting))
    }
}

impl Decoder for Codec {
    type Item = Unit;
    type Error = ZmtpError;

    fn decode(&mut self, from: &mut BytesMut) -> Result<Option<Unit>, ZmtpError> {
        if !self.is_greeted {
            return self.greeting(from);
        }
        loop {
            let Some(&flags) = from.first() else {
                return Ok(None);
            };
            if flags & !(MORE | LONG | COMMAND) != 0 {
                return Err(ZmtpError::Protocol("unknown flags"));
            }
            let (head, length) = if flags & LONG == 0 {
                let Some(&length) = from.get(1) else {
                    return Ok(None);
                };
                (2, u64::from(length))
            } else {
                let Some(mut length) = from.get(1..9) else {
                    return Ok(None);
                };
                (9, length.get_u64())
            };
            let limit = if flags & COMMAND == 0 {
                self.limit
            } else {
                COMMAND_BYTES
            };
            let too_large = || ZmtpError::TooLarge { limit };
            let length = usize::try_from(length).map_err(|_| too_large())?;
            if length > limit.saturating_sub(self.bytes) || self.frames.len() >= FRAMES {
                return Err(too_large());
            }
            if from.len() < head + length {
                from.reserve(head + length - from.len());
                return Ok(None);
            }
            from.advance(head);
            let body = from.split_to(length).freeze();
            if flags & COMMAND != 0 {
                return Ok(Some(Unit::Command(body)));
            }
            self.bytes += length;
            self.frames.push(body);
            if flags & MORE == 0 {
                self.bytes = 0;
                return Ok(Some(Unit::Message(std::mem::take(&mut self.frames))));
            }
        }
    }

    fn decode_eof(&mut self, from: &mut BytesMut) -> Result<Option<Unit>, ZmtpError> {
        // Half a message is as good as none.
        self.decode(from)
    }
}

impl Encoder<Unit> for Codec {
    type Error = ZmtpError;

    fn encode(&mut self, unit: Unit, to: &mut BytesMut) -> Result<(), ZmtpError> {
        match unit {
            Unit::Greeting => {
                to.put_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0]);
                to.put_slice(b"NULL");
                to.put_bytes(0, 16 + 1 + 31);
            }
            Unit::Command(body) => frame(COMMAND, &body, to),
            Unit::Message(frames) => {
                let last = frames.len().saturating_sub(1);
                for (i, body) in frames.iter().enumerate() {
                    frame(if i < last { MORE } else { 0 }, body, to);
                }
            }
        }
        Ok(())
    }
}

fn frame(flags: u8, body: &[u8], to: &mut BytesMut) {
    match u8::try_from(body.len()) {
        Ok(length) => to.put_slice(&[flags, length]),
        Err(_) => {
            to.put_u8(flags | LONG);
            to.put_u64(body.len() as u64);
        }
    }
    to.put_slice(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeted() -> Codec {
        Codec {
            is_greeted: true,
            ..Codec::new(1000)
        }
    }

    #[test]
    fn messages_come_through_in_any_pieces() {
        let message = Unit::Message(vec![
            Bytes::from_static(b"topic"),
            Bytes::new(),
            Bytes::from(vec![7; 300]),
        ]);
        let mut wire = BytesMut::new();
        let mut codec = Codec::new(1000);
        codec.encode(Unit::Greeting, &mut wire).unwrap();
        assert_eq!(wire.len(), GREETING_BYTES);
        codec.encode(message.clone(), &mut wire).unwrap();
        codec.encode(message.clone(), &mut wire).unwrap();
        for size in [1, 7, 100, 5000] {
            let (mut codec, mut buffer, mut units) = (Codec::new(1000), BytesMut::new(), vec![]);
            for piece in wire.chunks(size) {
                buffer.put_slice(piece);
                while let Some(unit) = codec.decode(&mut buffer).unwrap() {
                    units.push(unit);
                }
            }
            assert_eq!(units, [Unit::Greeting, message.clone(), message.clone()]);
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_reserved() {
        for length in [1001_u64, 1 << 40, u64::MAX] {
            let mut wire = BytesMut::from(&[LONG][..]);
            wire.put_u64(length);
            let refused = greeted().decode(&mut wire);
            assert!(matches!(refused, Err(ZmtpError::TooLarge { limit: 1000 })));
            assert!(wire.capacity() < 1000);
        }
        let mut wire = BytesMut::new();
        for _ in 0..4 {
            frame(MORE, &[0; 251], &mut wire);
        }
        let refused = greeted().decode(&mut wire);
        assert!(matches!(refused, Err(ZmtpError::TooLarge { .. })));
        let mut wire = BytesMut::new();
        for _ in 0..=FRAMES {
            frame(MORE, &[], &mut wire);
        }
        let refused = greeted().decode(&mut wire);
        assert!(matches!(refused, Err(ZmtpError::TooLarge { .. })));
    }

    #[test]
    fn what_is_no_zmq_is_refused() {
        for wire in [&b"HTTP/1.1 400 Bad Request"[..], &[0xff; 64], &[0; 64]] {
            let refused = Codec::new(1000).decode(&mut BytesMut::from(wire));
            assert!(matches!(refused, Err(ZmtpError::Protocol(_))));
        }
        let refused = greeted().decode(&mut BytesMut::from(&[0x80, 0][..]));
        assert!(matches!(refused, Err(ZmtpError::Protocol(_))));
    }
}
