//! Load lanes of owners: two gauges each, which all threads of the Envoy process share.
//!
//! The lanes are named `kv_router_lane_a.<pool>.<worker>.<rank>` and `kv_router_lane_b.<...>`, by
//! identity and not by slot, so a slot that changes hands carries no load over. What the fields of
//! a lane mean is said in [`kv_core::load`]; they are no counts for people to read.
//!
//! A third gauge, `kv_router_clock.<pool>.<worker>.<rank>`, says when the owner is taken to be done
//! with the prefills booked on it, in microseconds of the process's clock. It is moved by what it
//! is off, and held to what the lanes hold, so that of two threads which move it at once neither
//! is lost and what is too much is gone with the next step.

use hashbrown::HashMap;
use kv_core::board;
use kv_core::delay::Pace;
use kv_core::id::OwnerId;
use kv_core::ledger::Lanes as Raw;
use kv_core::load::{Delta, Load};
use kv_core::table::Table;

use crate::host::{Host, MetricId, MetricKind};

/// Owners whose gauges this VM remembers although the table no longer has them.
const MAX_OWNERS: usize = 4096;

/// Both gauges of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    a: MetricId,
    b: MetricId,
    /// When it is done with its prefills.
    clock: MetricId,
    /// Nanoseconds that it takes to prefill a token; 0 where no clock is kept.
    prefill_ns: u32,
    /// The owner as boards name it.
    name: u64,
}

impl Lane {
    /// The lane of an owner that takes so many nanoseconds to prefill a token.
    #[must_use]
    pub fn paced(self, prefill_ns: u32) -> Self {
        Self { prefill_ns, ..self }
    }

    /// Milliseconds from `now_ns` of the process's clock until the owner is done with its prefills,
    /// negative since it was, and how many it takes to a token.
    #[must_use]
    pub fn pace(self, host: &impl Host, now_ns: u64) -> Pace {
        if self.prefill_ns == 0 {
            return Pace::default();
        }
        Pace {
            finish_ms: self.ahead_us(host, now_ns) as f64 / 1e3,
            ms_per_token: f64::from(self.prefill_ns) / 1e6,
        }
    }

    /// So much prefill is about to be booked.
    pub(crate) fn wind(self, host: &impl Host, tokens: u32) {
        if self.prefill_ns > 0 {
            let ahead = self.ahead_us(host, host.now_ns());
            let held = ahead.clamp(0, self.queued_us(host));
            self.turn(host, held - ahead + self.takes_us(tokens));
        }
    }

    /// What was booked has become less: prefill that is done or given up takes no time.
    pub(crate) fn settle(self, host: &impl Host) {
        if self.prefill_ns > 0 {
            let ahead = self.ahead_us(host, host.now_ns());
            let over = ahead - self.queued_us(host);
            if over > 0 && ahead > 0 {
                self.turn(host, -over.min(ahead));
            }
        }
    }

    /// A booking of so much prefill is taken back as if it had never been.
    pub(crate) fn unwind(self, host: &impl Host, tokens: u32) {
        self.turn(host, -self.takes_us(tokens));
    }

    fn turn(self, host: &impl Host, by_us: i64) {
        if by_us != 0 {
            host.add(self.clock, by_us);
        }
    }

    fn ahead_us(self, host: &impl Host, now_ns: u64) -> i64 {
        let clock = host.metric(self.clock).unwrap_or(0);
        clock.wrapping_sub(now_ns / 1_000).cast_signed()
    }

    fn queued_us(self, host: &impl Host) -> i64 {
        let Load { prefill_tokens, .. } = Load::from_lanes(self.read_a(host), 0);
        self.takes_us(prefill_tokens)
    }

    fn takes_us(self, tokens: u32) -> i64 {
        i64::try_from(u64::from(tokens) * u64::from(self.prefill_ns) / 1_000).unwrap_or(i64::MAX)
    }

    /// The owner as [`kv_core::board`] names it.
    #[must_use]
    pub fn name(self) -> u64 {
        self.name
    }

    /// What they hold.
    #[must_use]
    pub fn read(self, host: &impl Host) -> Raw {
        Raw {
            a: self.read_a(host),
            b: host.metric(self.b).unwrap_or(0),
        }
    }

    /// What the first of them holds.
    #[must_use]
    pub fn read_a(self, host: &impl Host) -> u64 {
        host.metric(self.a).unwrap_or(0)
    }

    /// Adds to them. Only [`crate::bookings`] does, which reports the same.
    pub(crate) fn add(self, host: &impl Host, delta: Delta) {
        for (id, by) in [(self.a, delta.a), (self.b, delta.b)] {
            if by != 0 {
                host.add(id, by);
            }
        }
    }
}

/// Gauges by owner.
#[derive(Debug, Default)]
pub struct Lanes {
    pools: HashMap<String, HashMap<OwnerId, Lane>>,
}

impl Lanes {
    /// The gauges of an owner; `None` if Envoy did not define them.
    pub fn of(&mut self, host: &impl Host, pool: &str, owner: OwnerId) -> Option<Lane> {
        let owners = self.pools.entry_ref(pool).or_default();
        if let Some(lane) = owners.get(&owner) {
            return Some(*lane);
        }
        let OwnerId { worker, rank } = owner;
        let define = |lane: char| {
            let name = format!("kv_router_lane_{lane}.{pool}.{worker}.{rank}");
            host.define(MetricKind::Gauge, &name)
        };
        let lane = Lane {
            a: define('a')?,
            b: define('b')?,
            clock: host.define(
                MetricKind::Gauge,
                &format!("kv_router_clock.{pool}.{worker}.{rank}"),
            )?,
            prefill_ns: 0,
            name: board::owner(&format!("{pool}.{worker}.{rank}")),
        };
        // Reading them makes this VM one of those that keep them alive: a gauge ends with the last
        // VM that has touched it, and what was booked on it with it.
        let _ = (lane.read(host), host.metric(lane.clock));
        owners.insert(owner, lane);
        Some(lane)
    }

    /// Forgets owners that are not in the table, once there are too many. Bookings keep their own
    /// copy of a lane.
    pub fn trim(&mut self, table: &Table) {
        if self.pools.values().map(HashMap::len).sum::<usize>() <= MAX_OWNERS {
            return;
        }
        self.pools.retain(|name, owners| {
            let pool = table.pools.iter().find(|pool| pool.name == *name);
            owners.retain(|id, _| pool.is_some_and(|p| p.owners.iter().any(|o| o.id == *id)));
            !owners.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{Lane, Lanes};
    use crate::fake::Fake;
    use crate::host::Host as _;
    use kv_core::id::OwnerId;
    use kv_core::load::{Delta, Leg};
    use kv_core::table::{Owner, Pool, Table};

    /// The lane of a worker that takes 50 us to a token.
    fn paced(host: &Fake) -> Lane {
        let owner = OwnerId { worker: 7, rank: 0 };
        Lanes::default().of(host, "p", owner).unwrap().paced(50_000)
    }

    fn book(lane: Lane, host: &Fake, tokens: u32) -> Leg {
        lane.wind(host, tokens);
        let (leg, delta) = Leg::book(tokens, 0);
        lane.add(host, delta);
        leg
    }

    fn take(lane: Lane, host: &Fake, delta: Delta) {
        lane.add(host, delta);
        lane.settle(host);
    }

    fn finish_ms(lane: Lane, host: &Fake) -> f64 {
        lane.pace(host, host.now_ns()).finish_ms
    }

    #[test]
    fn prefills_that_all_vms_book_are_done_one_after_the_other() {
        let host = Fake::default();
        host.advance_ms(1_000);
        let other = host.beside();
        let (here, there) = (paced(&host), paced(&other));
        assert!(finish_ms(here, &host) < 0.0);
        book(here, &host, 1_000);
        book(there, &other, 2_000);
        assert_eq!(finish_ms(here, &host), 150.0);
        assert_eq!(here.pace(&host, host.now_ns()).ms_per_token, 0.05);
        host.advance_ms(40);
        assert_eq!(finish_ms(there, &other), 110.0);
        // Idle time is not saved up.
        host.advance_ms(1_000);
        assert_eq!(finish_ms(here, &host), -890.0);
        book(here, &host, 100);
        assert_eq!(finish_ms(here, &host), 5.0);
    }

    #[test]
    fn a_first_token_takes_off_what_is_not_booked_any_more() {
        let host = Fake::default();
        host.advance_ms(1_000);
        let lane = paced(&host);
        let (mut first, mut second) = (book(lane, &host, 1_000), book(lane, &host, 2_000));
        host.advance_ms(10);
        take(lane, &host, first.first_token());
        assert_eq!(finish_ms(lane, &host), 100.0, "all of the second is left");
        host.advance_ms(60);
        take(lane, &host, second.release());
        assert_eq!(finish_ms(lane, &host), 0.0);
        take(lane, &host, first.release());
        assert_eq!(finish_ms(lane, &host), 0.0);
    }

    #[test]
    fn a_booking_taken_back_leaves_the_clock_as_it_was() {
        let host = Fake::default();
        host.advance_ms(1_000);
        let lane = paced(&host);
        book(lane, &host, 400);
        let mut undone = book(lane, &host, 1_000);
        lane.add(&host, undone.release());
        lane.unwind(&host, 1_000);
        assert_eq!(finish_ms(lane, &host), 20.0);
    }

    #[test]
    fn no_clock_is_kept_where_nothing_predicts() {
        let host = Fake::default();
        host.advance_ms(1_000);
        let lane = paced(&host).paced(0);
        let mut leg = book(lane, &host, 1_000);
        take(lane, &host, leg.release());
        assert_eq!(lane.pace(&host, host.now_ns()), super::Pace::default());
        assert_eq!(host.named("kv_router_clock.p.7.0"), 0);
    }

    #[test]
    fn owners_that_left_are_forgotten_when_they_are_many() {
        let host = Fake::default();
        let mut lanes = Lanes::default();
        for worker in 0..5000 {
            lanes.of(&host, "p", OwnerId { worker, rank: 0 });
        }
        let table = Table {
            pools: vec![Pool {
                name: "p".into(),
                owners: vec![Owner {
                    slot: kv_core::id::Slot(0),
                    id: OwnerId { worker: 3, rank: 0 },
                    role: kv_core::id::Role::Aggregated,
                    endpoint: String::new(),
                    accepting: true,
                    traits: kv_core::table::Traits::default(),
                    metadata: kv_core::table::Metadata::default(),
                }],
                ..Pool::default()
            }],
            ..Table::default()
        };
        lanes.trim(&table);
        assert_eq!(lanes.pools["p"].len(), 1);
    }
}
