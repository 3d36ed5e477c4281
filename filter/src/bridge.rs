//! The bridge: copies the sidecar's writes into Envoy's shared data.
//!
//! One root context of one VM of the process does so, chosen by [`kv_core::lease`]. It only copies
//! bytes; the order of the writes is the sidecar's. In the other direction it passes on the VMs'
//! reports ([`crate::relay`]).

use kv_core::head::Head;
use kv_core::key::{self, FORMAT};
use kv_core::lease::{Election, Holder, Move, MoveKind, Sight};
use kv_core::queue::mailbox_name;
use kv_core::wire::{self, Ack, Batch, METHOD, SERVICE, Subscribe, Up, WireError};

use crate::config::Config;
use crate::fleet::Fleet;
use crate::host::{Expect, Host, Level, Token};
use crate::link::{Link, State};
use crate::metrics::{Event, Fault, Metrics};
use crate::relay::Relay;

/// Ticks for which an idle VM's stamp counts.
const FRESH_TICKS: u64 = 3;
/// First and longest wait before the stream is opened again.
const BACKOFF_NS: (u64, u64) = (100_000_000, 2_000_000_000);

/// How long a sidecar may be silent, which writes once a second, until nothing more is sent to it:
/// Envoy would keep it all.
const SILENT_NS: u64 = 5_000_000_000;

/// Who this VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Random number of the VM.
    pub vm: u64,
    /// Random number of the Envoy process.
    pub process: u64,
}

impl Identity {
    /// Makes a VM known. The first one of a process seeds what all share.
    #[must_use]
    pub fn seed(host: &impl Host) -> Self {
        let free = kv_core::lease::Record::default().encode();
        host.set_shared(&key::LEASE, &free, Expect::Nothing);
        let process = host.random();
        host.set_shared(&key::PROCESS, &process.to_le_bytes(), Expect::Nothing);
        let seeded = host.shared(&key::PROCESS);
        let seeded = seeded.and_then(|shared| shared.bytes.try_into().ok());
        Self {
            vm: host.random(),
            process: seeded.map_or(process, u64::from_le_bytes),
        }
    }
}

/// Shows that a VM without traffic is there.
pub fn stamp_idle(host: &impl Host, now_ns: u64) {
    host.set_shared(&key::IDLE, &now_ns.to_le_bytes(), Expect::Anything);
}

/// Whether the sidecar is heard, as far as this root context has made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    Unknown,
    Heard,
    Silent,
}

/// One root context's part in the bridge.
#[derive(Debug)]
pub struct Bridge {
    identity: Identity,
    election: Election,
    cluster: String,
    fresh_ns: u64,
    link: Link,
    /// When the stream was opened or last brought a message.
    heard_ns: u64,
    voice: Voice,
    relay: Relay,
}

impl Bridge {
    /// The part of a root context with this configuration.
    #[must_use]
    pub fn new(identity: Identity, root: u32, config: &Config) -> Self {
        let me = Holder {
            vm: identity.vm,
            root,
        };
        let ns = |ms: u32| u64::from(ms) * 1_000_000;
        Self {
            identity,
            election: Election::new(me, ns(config.lease_ms)),
            cluster: config.sidecar_cluster.clone(),
            fresh_ns: FRESH_TICKS * ns(config.tick_ms),
            link: Link::new(BACKOFF_NS),
            heard_ns: 0,
            voice: Voice::Unknown,
            relay: Relay::default(),
        }
    }

    /// Takes part in the election and keeps the stream of the elected.
    pub fn on_tick(&mut self, host: &impl Host, metrics: &mut Metrics, busy: bool) {
        let now_ns = host.now_ns();
        self.elect(host, metrics, busy, now_ns);
        match (self.election.leads(), self.link.state()) {
            (Some(term), State::Down { retry_ns }) if now_ns >= retry_ns => {
                self.open(host, metrics, term, now_ns);
            }
            (None, State::Up(token)) | (_, State::Given(token)) => {
                host.reset_stream(token);
                self.link.ended(now_ns);
            }
            (_, State::Down { .. }) | (Some(_), State::Up(_)) => {}
        }
        self.relay(host, metrics);
    }

    /// Passes on the reports that are in the queue.
    pub fn relay(&mut self, host: &impl Host, metrics: &mut Metrics) {
        // A leader that was away for longer than its lease leaves the queue to the next one.
        let lease = host.shared(&key::LEASE).unwrap_or_default();
        if !self.election.holds(&lease.bytes) {
            return;
        }
        let stream = self.listener(host.now_ns());
        if !self.relay.drain(host, metrics, stream) {
            self.lose(host, metrics);
        }
    }

    /// Shows the sidecar the lanes, when that is due.
    pub fn show_lanes(&mut self, host: &impl Host, metrics: &mut Metrics, fleet: &Fleet) {
        let now_ns = host.now_ns();
        if self.election.leads().is_some()
            && let Some(stream) = self.listener(now_ns)
            && !self.relay.show(host, stream, fleet, now_ns)
        {
            self.lose(host, metrics);
        }
    }

    /// Whether this root context is the bridge.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.election.leads().is_some()
    }

    /// Leaves the bridge to others, for good or until the next tick.
    pub fn step_aside(&mut self, host: &impl Host) {
        if self.election.leads().is_some()
            && let Some(lease) = host.shared(&key::LEASE)
            && let Some(step) = self.election.resign(&lease.bytes)
        {
            self.write(host, step, lease.version, 0);
        }
        self.link.reset(host);
    }

    /// A message of `size` bytes has come.
    pub fn on_message(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        token: Token,
        size: usize,
    ) {
        if self.link.up() != Some(token) {
            return;
        }
        // One look per message: a bridge that was away for longer than its lease writes nothing.
        let lease = host.shared(&key::LEASE).unwrap_or_default();
        if !self.election.holds(&lease.bytes) {
            metrics.fault(host, Fault::Fenced);
            self.link.give_up();
            return;
        }
        self.heard_ns = host.now_ns();
        let message = host.message(size);
        match wire::decode::<Batch<'_>>(&message) {
            Ok(batch) => self.write_batch(host, metrics, token, &batch),
            Err(error) => self.refuse(host, metrics, error),
        }
    }

    /// A stream was closed by the other side or could not be connected.
    pub fn on_close(&mut self, host: &impl Host, metrics: &mut Metrics, token: Token) {
        if self.link.token() == Some(token) {
            host.close_stream(token);
            metrics.fault(host, Fault::Closed);
            let now_ns = host.now_ns();
            self.fall_silent(host, now_ns);
            self.link.ended(now_ns);
        }
    }

    fn elect(&mut self, host: &impl Host, metrics: &mut Metrics, busy: bool, now_ns: u64) {
        let Some(lease) = host.shared(&key::LEASE) else {
            return;
        };
        let idle_present = busy && idle_age_ns(host, now_ns).is_some_and(|age| age < self.fresh_ns);
        let sight = Sight {
            now_ns,
            lease: &lease.bytes,
            busy,
            idle_present,
        };
        let before = self.election.leads();
        if let Some(step) = self.election.step(&sight) {
            self.write(host, step, lease.version, now_ns);
        }
        match (before, self.election.leads()) {
            (None, Some(term)) => {
                metrics.count(host, Event::Lease, 1);
                host.log(Level::Info, &format!("bridge leads in term {term}"));
                self.relay.register(host);
                self.link.hurry();
            }
            (Some(term), None) => {
                host.log(Level::Info, &format!("bridge led until term {term}"));
            }
            _ => {}
        }
    }

    fn write(&mut self, host: &impl Host, step: Move, version: u32, now_ns: u64) {
        let record = step.record.encode();
        let written = host.set_shared(&key::LEASE, &record, Expect::Version(version));
        if step.kind == MoveKind::Yield && written {
            host.log(Level::Info, "bridge hands over");
        }
        self.election.done(step, written, now_ns);
    }

    fn open(&mut self, host: &impl Host, metrics: &mut Metrics, term: u64, now_ns: u64) {
        let Some(token) = host.open_stream(&self.cluster, SERVICE, METHOD) else {
            metrics.fault(host, Fault::Connect);
            self.fall_silent(host, now_ns);
            self.link.ended(now_ns);
            return;
        };
        self.link.opened(token);
        self.heard_ns = now_ns;
        let head = host.shared(&key::HEAD);
        let head = head.and_then(|shared| Head::decode(&shared.bytes));
        let vm_id = host.property(b"plugin_vm_id").unwrap_or_default();
        let subscribe = Up::Subscribe(Subscribe {
            format: FORMAT,
            process: self.identity.process,
            vm_id: String::from_utf8_lossy(&vm_id).into_owned(),
            term,
            epoch: head.map(|head| head.epoch),
            level: head.map_or(0, |head| head.level),
        });
        self.say(host, metrics, token, &subscribe);
        // Every VM reports whole to it.
        host.set_shared(&key::STREAM, &host.random().to_le_bytes(), Expect::Anything);
    }

    /// The stream, if somebody listens at its other end.
    fn listener(&self, now_ns: u64) -> Option<Token> {
        let is_heard = now_ns.saturating_sub(self.heard_ns) < SILENT_NS;
        self.link.up().filter(|_| is_heard)
    }

    /// The stream takes no more messages.
    fn lose(&mut self, host: &impl Host, metrics: &mut Metrics) {
        metrics.fault(host, Fault::Closed);
        self.link.give_up();
    }

    fn write_batch(
        &mut self,
        host: &impl Host,
        metrics: &mut Metrics,
        token: Token,
        batch: &Batch<'_>,
    ) {
        let (mut written, mut refused) = (0_u32, 0_u32);
        for write in &batch.writes {
            let done = match key::mailed(write.key) {
                Some(mailbox) => post(host, mailbox, write.value),
                None => {
                    key::is_published(write.key)
                        && host.set_shared(write.key, write.value, Expect::Anything)
                }
            };
            *(if done { &mut written } else { &mut refused }) += 1;
        }
        metrics.count(host, Event::Batch, 1);
        metrics.count(host, Event::Write, written);
        metrics.count(host, Event::Refused, refused);
        self.link.works();
        if self.voice != Voice::Heard {
            self.voice = Voice::Heard;
            host.set_shared(&key::SILENT, &0_u64.to_le_bytes(), Expect::Anything);
        }
        let ack = Up::Ack(Ack {
            seq: batch.seq,
            written_at_ns: host.unix_ns(),
            refused,
        });
        self.say(host, metrics, token, &ack);
    }

    fn refuse(&mut self, host: &impl Host, metrics: &mut Metrics, error: WireError) {
        metrics.fault(host, Fault::Wire(error));
        host.log(Level::Error, &format!("message of the sidecar: {error}"));
        self.link.give_up();
    }

    fn say(&mut self, host: &impl Host, metrics: &mut Metrics, token: Token, message: &Up) {
        if !host.send(token, &wire::encode(message)) {
            self.lose(host, metrics);
        }
    }

    /// There is no stream that the sidecar could be heard on. The first time counts.
    fn fall_silent(&mut self, host: &impl Host, now_ns: u64) {
        let since = host.shared(&key::SILENT);
        let is_told = since.is_some_and(|since| since.bytes.iter().any(|byte| *byte > 0));
        if self.voice != Voice::Silent && !is_told {
            host.set_shared(&key::SILENT, &now_ns.to_le_bytes(), Expect::Anything);
        }
        self.voice = Voice::Silent;
    }
}

/// Puts mail where its VM looks for it.
fn post(host: &impl Host, mailbox: u8, mail: &[u8]) -> bool {
    let queue = host.resolve_queue(&mailbox_name(mailbox));
    queue.is_some_and(|queue| host.enqueue(queue, mail))
}

/// Time since some VM without traffic showed itself. The clock is the process's.
fn idle_age_ns(host: &impl Host, now_ns: u64) -> Option<u64> {
    let stamp = host.shared(&key::IDLE)?.bytes.try_into().ok()?;
    Some(now_ns.saturating_sub(u64::from_le_bytes(stamp)))
}
