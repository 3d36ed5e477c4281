//! The bridge's lease: which of an Envoy process's VMs holds the stream to the sidecar.
//!
//! The lease is one record in shared data that is only ever changed by compare-and-swap. Its
//! holder renews it at every tick. Others take it over when its bytes have not changed for the
//! lease's length *by their own clock*, so no two clocks are compared. The term grows with every
//! takeover; a holder that was away finds another term and knows that it has been replaced.
//!
//! A VM that carries traffic is a poor bridge: every batch delays its requests. Such a VM waits
//! three times as long before it takes the lease, and hands it back once an idle VM is there.
//!
//! Ticks are expected several times per lease. One [`Election`] belongs to one root context.

/// A root context of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Random number of the VM.
    pub vm: u64,
    /// Id of the root context within the VM.
    pub root: u32,
}

/// What stands in shared data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who holds the lease; `None` when it is free.
    pub holder: Option<Holder>,
    /// Grows with every takeover.
    pub term: u64,
    /// Grows with every write within a term.
    pub beat: u64,
}

impl Record {
    /// Encoded size in bytes.
    pub const SIZE: usize = 29;

    /// Little-endian fields: held, VM, root, term, beat.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let holder = self.holder.unwrap_or(Holder { vm: 0, root: 0 });
        let mut bytes = Vec::with_capacity(Self::SIZE);
        bytes.push(u8::from(self.holder.is_some()));
        bytes.extend(holder.vm.to_le_bytes());
        bytes.extend(holder.root.to_le_bytes());
        bytes.extend(self.term.to_le_bytes());
        bytes.extend(self.beat.to_le_bytes());
        bytes
    }

    /// The inverse of [`Record::encode`]; `None` unless the length is right.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::SIZE] = bytes.try_into().ok()?;
        let [held, rest @ ..] = bytes;
        let (vm, rest) = rest.split_first_chunk()?;
        let (root, rest) = rest.split_first_chunk()?;
        let (term, rest) = rest.split_first_chunk()?;
        let (beat, _) = rest.split_first_chunk()?;
        let holder = Holder {
            vm: u64::from_le_bytes(*vm),
            root: u32::from_le_bytes(*root),
        };
        Some(Self {
            holder: (*held != 0).then_some(holder),
            term: u64::from_le_bytes(*term),
            beat: u64::from_le_bytes(*beat),
        })
    }
}

/// Multiples of the lease that a VM with traffic waits before it takes a lease.
const BUSY_PATIENCE: u64 = 3;

/// How long a leader with traffic keeps the lease although an idle VM is there.
const BUSY_LEAD_NS: u64 = 2_000_000_000;

/// What a root context sees at a tick.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// The VM's monotonic clock, nanoseconds.
    pub now_ns: u64,
    /// The lease's bytes in shared data.
    pub lease: &'a [u8],
    /// Whether this VM carries traffic.
    pub busy: bool,
    /// Whether some VM without traffic has shown itself lately.
    pub idle_present: bool,
}

/// A write to the lease, to be made only if its bytes are still those that were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The record to write.
    pub record: Record,
    /// What the write is for.
    pub kind: MoveKind,
}

/// What a [`Move`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveKind {
    /// Takes the lease.
    Take,
    /// Keeps it.
    Renew,
    /// Gives it back.
    Yield,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lead {
    term: u64,
    since_ns: u64,
}

/// One root context's part in the election.
#[derive(Clone, Debug)]
pub struct Election {
    me: Holder,
    lease_ns: u64,
    lead: Option<Lead>,
    /// Bytes last seen and when they were first seen.
    seen: Option<(Vec<u8>, u64)>,
    /// Highest term ever seen, so that broken bytes can't set the terms back.
    term: u64,
}

impl Election {
    /// A candidate with a lease of this length in nanoseconds.
    #[must_use]
    pub fn new(me: Holder, lease_ns: u64) -> Self {
        Self {
            me,
            lease_ns,
            lead: None,
            seen: None,
            term: 0,
        }
    }

    /// The term this root context leads in, as far as it knows.
    #[must_use]
    pub fn leads(&self) -> Option<u64> {
        self.lead.map(|lead| lead.term)
    }

    /// Whether the lease's bytes say that this root context leads in the term it believes in: the
    /// fence before every batch of writes.
    #[must_use]
    pub fn holds(&self, lease: &[u8]) -> bool {
        let held = Record::decode(lease);
        held.is_some_and(|r| r.holder == Some(self.me) && Some(r.term) == self.leads())
    }

    /// What to write at this tick, if anything. [`Election::done`] takes the outcome.
    #[must_use]
    pub fn step(&mut self, sight: &Sight<'_>) -> Option<Move> {
        let record = self.read(sight.lease);
        if self.holds(sight.lease) {
            let lead_ns = self
                .lead
                .map_or(0, |lead| sight.now_ns.saturating_sub(lead.since_ns));
            let hand_back = sight.busy && sight.idle_present && lead_ns > BUSY_LEAD_NS;
            return Some(if hand_back {
                self.give_back(record)
            } else {
                Move {
                    record: Record {
                        beat: record.beat.wrapping_add(1),
                        ..record
                    },
                    kind: MoveKind::Renew,
                }
            });
        }
        self.lead = None;
        let unchanged_ns = self.observe(sight.lease, sight.now_ns);
        let patience_ns = match (record.holder, sight.busy) {
            (None, false) => 0,
            (Some(_), false) => self.lease_ns,
            (_, true) => self.lease_ns.saturating_mul(BUSY_PATIENCE),
        };
        (unchanged_ns >= patience_ns).then(|| Move {
            record: Record {
                holder: Some(self.me),
                term: self.term.wrapping_add(1),
                beat: 0,
            },
            kind: MoveKind::Take,
        })
    }

    /// What to write to step aside for good; `None` if this root context doesn't hold the lease.
    #[must_use]
    pub fn resign(&mut self, lease: &[u8]) -> Option<Move> {
        let record = self.read(lease);
        let held = self.holds(lease);
        if !held {
            self.lead = None;
        }
        held.then(|| self.give_back(record))
    }

    /// Takes the outcome of a move: whether the bytes were still those that were seen.
    pub fn done(&mut self, step: Move, written: bool, now_ns: u64) {
        self.lead = match (step.kind, written) {
            (MoveKind::Take, true) => Some(Lead {
                term: step.record.term,
                since_ns: now_ns,
            }),
            (MoveKind::Renew, true) => self.lead,
            (MoveKind::Yield, _) | (_, false) => None,
        };
        // Whoever wrote, the bytes are not those that were watched.
        self.seen = None;
    }

    fn give_back(&self, record: Record) -> Move {
        Move {
            record: Record {
                holder: None,
                term: record.term,
                beat: record.beat.wrapping_add(1),
            },
            kind: MoveKind::Yield,
        }
    }

    /// Broken bytes count as a holder that never renews.
    fn read(&mut self, lease: &[u8]) -> Record {
        let record = Record::decode(lease).unwrap_or(Record {
            holder: Some(Holder { vm: 0, root: 0 }),
            ..Record::default()
        });
        self.term = self.term.max(record.term);
        record
    }

    /// Nanoseconds since these bytes were first seen.
    fn observe(&mut self, lease: &[u8], now_ns: u64) -> u64 {
        match &self.seen {
            Some((bytes, since_ns)) if bytes == lease => now_ns.saturating_sub(*since_ns),
            _ => {
                self.seen = Some((lease.to_vec(), now_ns));
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const TICK: u64 = 50 * MS;
    const LEASE: u64 = 300 * MS;

    /// VMs of one process around one record. Every VM has a clock of its own.
    struct Process {
        lease: Vec<u8>,
        vms: Vec<Vm>,
        now_ns: u64,
    }

    struct Vm {
        election: Election,
        busy: bool,
        alive: bool,
        clock_ns: u64,
    }

    impl Process {
        fn new(busy: &[bool]) -> Self {
            let vm = |(i, busy): (usize, &bool)| Vm {
                election: Election::new(
                    Holder {
                        vm: i as u64 + 1,
                        root: 7,
                    },
                    LEASE,
                ),
                busy: *busy,
                alive: true,
                clock_ns: 1_000 * MS * i as u64,
            };
            Self {
                lease: Record::default().encode(),
                vms: busy.iter().enumerate().map(vm).collect(),
                now_ns: 0,
            }
        }

        fn tick(&mut self) {
            self.now_ns += TICK;
            let idle_present = self.vms.iter().any(|vm| vm.alive && !vm.busy);
            for vm in self.vms.iter_mut().filter(|vm| vm.alive) {
                let now_ns = vm.clock_ns + self.now_ns;
                let sight = Sight {
                    now_ns,
                    lease: &self.lease,
                    busy: vm.busy,
                    idle_present,
                };
                if let Some(step) = vm.election.step(&sight) {
                    self.lease = step.record.encode();
                    vm.election.done(step, true, now_ns);
                }
            }
        }

        fn run_ms(&mut self, ms: u64) {
            for _ in 0..ms * MS / TICK {
                self.tick();
                let leaders = self.vms.iter().filter(|vm| vm.alive && self.holds(vm));
                assert!(leaders.count() <= 1);
            }
        }

        fn holds(&self, vm: &Vm) -> bool {
            vm.election.holds(&self.lease)
        }

        fn leader(&self) -> Option<usize> {
            self.vms.iter().position(|vm| self.holds(vm))
        }
    }

    #[test]
    fn a_record_survives_encoding() {
        let record = Record {
            holder: Some(Holder {
                vm: u64::MAX - 3,
                root: 9,
            }),
            term: 5,
            beat: u64::MAX,
        };
        assert_eq!(record.encode().len(), Record::SIZE);
        assert_eq!(Record::decode(&record.encode()), Some(record));
        let free = Record::default();
        assert_eq!(Record::decode(&free.encode()), Some(free));
        assert_eq!(Record::decode(&free.encode()[1..]), None);
    }

    #[test]
    fn a_free_lease_is_taken_at_once_and_kept() {
        let mut process = Process::new(&[false, false, false]);
        process.tick();
        assert_eq!(process.leader(), Some(0));
        process.run_ms(10_000);
        assert_eq!(process.leader(), Some(0));
        assert_eq!(process.vms[0].election.leads(), Some(1));
    }

    #[test]
    fn a_silent_leader_is_replaced_after_the_lease_and_fenced_when_it_is_back() {
        let mut process = Process::new(&[false, false]);
        process.run_ms(1_000);
        process.vms[0].alive = false;
        process.run_ms(250);
        assert_eq!(process.leader(), Some(0), "nobody hurries");
        process.tick();
        assert_eq!(process.leader(), Some(1));
        assert_eq!(process.vms[1].election.leads(), Some(2));
        // Before its first tick the old leader still believes in its term; the fence does not.
        assert_eq!(process.vms[0].election.leads(), Some(1));
        assert!(!process.holds(&process.vms[0]));
        process.vms[0].alive = true;
        process.tick();
        assert_eq!(process.vms[0].election.leads(), None);
        assert_eq!(process.leader(), Some(1));
    }

    #[test]
    fn a_leader_with_traffic_makes_way_for_an_idle_vm() {
        let mut process = Process::new(&[true, true]);
        process.run_ms(1_000);
        assert_eq!(process.leader(), Some(0));
        process.run_ms(5_000);
        assert_eq!(process.leader(), Some(0), "no idle VM, no change");
        process.vms[1].busy = false;
        process.run_ms(200);
        assert_eq!(process.leader(), Some(1));
        process.run_ms(5_000);
        assert_eq!(process.leader(), Some(1));
    }

    #[test]
    fn traffic_makes_candidates_patient() {
        let mut process = Process::new(&[false, true, true]);
        process.run_ms(500);
        process.vms[0].alive = false;
        process.run_ms(800);
        assert!(process.vms[1..].iter().all(|vm| !process.holds(vm)));
        process.run_ms(200);
        assert_eq!(process.leader(), Some(1));
    }

    #[test]
    fn losing_the_swap_ends_the_lead() {
        let mut election = Election::new(Holder { vm: 1, root: 1 }, LEASE);
        let free = Record::default().encode();
        let sight = Sight {
            now_ns: 5,
            lease: &free,
            busy: false,
            idle_present: true,
        };
        let step = election.step(&sight).unwrap();
        election.done(step, false, 5);
        assert_eq!(election.leads(), None);
        let step = election.step(&sight).unwrap();
        election.done(step, true, 5);
        assert_eq!(election.leads(), Some(1));
        let held = step.record.encode();
        let renew = election
            .step(&Sight {
                lease: &held,
                ..sight
            })
            .unwrap();
        assert_eq!(renew.kind, MoveKind::Renew);
        election.done(renew, false, 6);
        assert_eq!(election.leads(), None);
    }

    #[test]
    fn resigning_frees_the_lease_and_keeps_the_term() {
        let mut process = Process::new(&[false, true]);
        process.run_ms(1_000);
        let lease = process.lease.clone();
        assert_eq!(process.vms[1].election.resign(&lease), None);
        let step = process.vms[0].election.resign(&lease).unwrap();
        assert_eq!((step.record.holder, step.record.term), (None, 1));
        process.vms[0].election.done(step, true, 0);
        assert_eq!(process.vms[0].election.leads(), None);
    }

    #[test]
    fn broken_bytes_are_replaced_after_the_lease_with_a_higher_term() {
        let mut process = Process::new(&[false]);
        process.run_ms(500);
        process.lease = b"garbage".to_vec();
        process.run_ms(200);
        assert_eq!(process.leader(), None);
        process.run_ms(300);
        assert_eq!(process.vms[0].election.leads(), Some(2));
    }
}
