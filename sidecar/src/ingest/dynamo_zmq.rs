//! The door to Dynamo's event plane over ZMQ. A message is `[topic, publisher u64, sequence u64,
//! frame]`, the frame a header of version (1) and length around the envelope that NATS carries too.
//!
//! Each publisher process has a socket of its own, a broker one for all. Nothing is replayed there:
//! what was missed shows in the ids of events.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf as _, Bytes};

use super::stream::{Gone, Hall, unix_ns};
use super::subject::TOPIC;
use super::zmq::MESSAGE_BYTES;
use super::zmtp::{Connection, Role, ZmtpError};
use super::{Arrival, Plane, decode, pause};
use crate::metrics::PlaneKind;

/// Version of the frame.
const VERSION: u8 = 1;

/// One publisher's or broker's socket.
#[derive(Debug)]
pub struct Publisher {
    /// `host:port`.
    pub address: String,
    /// The way to the index.
    pub hall: Hall,
    /// Sockets of the plane that are connected.
    pub connected: Arc<AtomicUsize>,
}

impl Publisher {
    /// Reads for ever.
    ///
    /// # Errors
    /// When the index is gone.
    pub async fn run(self) -> Result<Gone, Gone> {
        let mut failed = 0_u32;
        loop {
            let why = match self.subscribe().await {
                Ok(connection) => {
                    self.count("opened");
                    if self.connected.fetch_add(1, Ordering::AcqRel) == 0 {
                        self.tell(Arrival::Connected(Plane::Dynamo)).await?;
                    }
                    let (why, messages) = self.read(connection).await?;
                    if self.connected.fetch_sub(1, Ordering::AcqRel) == 1 {
                        self.tell(Arrival::Disconnected(Plane::Dynamo)).await?;
                    }
                    if messages > 0 {
                        failed = 0;
                    }
                    why
                }
                Err(why) => why,
            };
            self.count(why.kind());
            if failed == 0 {
                let address = &self.address;
                tracing::warn!(address, %why, "no dynamo events over zmq, trying again");
            }
            tokio::time::sleep(pause::after(failed)).await;
            failed = failed.saturating_add(1);
        }
    }

    async fn subscribe(&self) -> Result<Connection, ZmtpError> {
        let mut connection = Connection::open(&self.address, Role::Sub, MESSAGE_BYTES).await?;
        // A broker's topics are whole subjects: they begin with anything.
        connection.subscribe("").await?;
        Ok(connection)
    }

    async fn read(&self, mut connection: Connection) -> Result<(ZmtpError, u64), Gone> {
        let mut messages = 0;
        loop {
            let message = match connection.receive().await {
                Ok(message) => message,
                Err(why) => return Ok((why, messages)),
            };
            messages += 1;
            let [topic, _, _, frame] = message.as_slice() else {
                self.count("malformed");
                continue;
            };
            if !is_events(topic) {
                continue;
            }
            let Some(envelope) = envelope(frame) else {
                self.count("malformed");
                continue;
            };
            let (plane, kind) = (Plane::Dynamo.kind(), "events");
            let label = PlaneKind { plane, kind };
            self.hall.metrics.messages.get_or_create(&label).inc();
            self.tell(Arrival::Events {
                plane: Plane::Dynamo,
                received_ns: unix_ns(),
                decoded: decode::dynamo(&envelope),
            })
            .await?;
        }
    }

    fn count(&self, kind: &'static str) {
        let plane = Plane::Dynamo.kind();
        let label = PlaneKind { plane, kind };
        self.hall.metrics.streams.get_or_create(&label).inc();
    }

    async fn tell(&self, arrival: Arrival) -> Result<(), Gone> {
        self.hall.arrivals.send(arrival).await.map_err(|_| Gone)
    }
}

/// A publisher's topic is bare, a broker's ends its subject.
fn is_events(topic: &[u8]) -> bool {
    let rest = topic.strip_suffix(TOPIC.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with(b"."))
}

/// What a frame holds.
fn envelope(frame: &Bytes) -> Option<Bytes> {
    let mut rest = frame.clone();
    if rest.len() < 5 || rest.get_u8() != VERSION {
        return None;
    }
    let length = usize::try_from(rest.get_u32()).ok()?;
    (rest.len() == length).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_of_publishers_and_brokers_are_told_from_others() {
        assert!(is_events(b"kv-events"));
        assert!(is_events(b"namespace.a.component.b.endpoint.c.kv-events"));
        for other in [&b"kv_metrics"[..], b"", b"other-kv-events", b"kv-events.x"] {
            assert!(!is_events(other));
        }
    }

    #[test]
    fn a_frame_has_its_version_and_length() {
        let frame = |bytes: &'static [u8]| envelope(&Bytes::from_static(bytes));
        assert_eq!(frame(b"\x01\0\0\0\x02ab"), Some(Bytes::from_static(b"ab")));
        assert_eq!(frame(b"\x01\0\0\0\x03ab"), None);
        assert_eq!(frame(b"\x02\0\0\0\x02ab"), None);
        assert_eq!(frame(b"\x01\0\0"), None);
    }
}
