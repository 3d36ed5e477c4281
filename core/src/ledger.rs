//! What the VMs of one Envoy process have added to its lanes, as reported.
//!
//! Per owner the lanes hold the sum over all VMs that ever ran in the process. A VM reports its own
//! sums whole, so a lost report is made good by the next. A VM that falls silent keeps its last
//! sums here for ever; whatever it added after them shows up as a difference between ledger and
//! lanes once both have been quiet, and is then entered as well. What is left of nobody is written
//! off: a live VM takes it out of the lanes, which is a part of its own sums from then on.

use std::collections::BTreeMap;

use hashbrown::HashMap;

use crate::load::Load;
use crate::report::{OwnerKey, Report, Step, Sum};

/// How long neither lanes nor reports of an owner may have changed before a difference between
/// them counts as a leak.
const QUIET_MS: u64 = 2_000;

/// VMs without a sign of life whose sums are kept apart, at most.
const MAX_SILENT: usize = 64;

/// Two lanes, modulo 2^64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    /// Lane A.
    pub a: u64,
    /// Lane B.
    pub b: u64,
}

impl Lanes {
    /// The load they hold.
    #[must_use]
    pub fn load(&self) -> Load {
        Load::from_lanes(self.a, self.b)
    }

    /// The same without what is counted more than once, the low half of lane B.
    #[allow(clippy::cast_possible_truncation)]
    fn in_full(self) -> Self {
        let double = self.b as i32;
        Self {
            a: self.a,
            b: self.b.wrapping_sub_signed(i64::from(double)),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            a: self.a.wrapping_add(other.a),
            b: self.b.wrapping_add(other.b),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            a: self.a.wrapping_sub(other.a),
            b: self.b.wrapping_sub(other.b),
        }
    }
}

/// How a report follows the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// It is the next one, or complete.
    Next,
    /// Reports before it were lost: steps are missing until a complete one comes.
    Gap,
    /// It came before.
    Repeated,
}

/// A VM that fell silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retired {
    /// Its nonce.
    pub vm: u64,
    /// Whether it had said that it would report little.
    pub was_leaving: bool,
}

#[derive(Debug, Default)]
struct Vm {
    sequence: u64,
    heard_ms: u64,
    /// Whether its bookings count for nothing because it fell silent, or has none any more.
    is_retired: bool,
    /// Whether it reports only what happens to the requests it has.
    is_leaving: bool,
    sums: HashMap<OwnerKey, Lanes>,
    /// The part of its sums that takes out what VMs before it had left.
    written_off: HashMap<OwnerKey, Lanes>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Owner {
    /// Sums of VMs that are gone, and leaks found.
    settled: Lanes,
    /// Lanes as Envoy last showed them.
    seen: Lanes,
    /// Since when they, and the reports, are as they are.
    quiet_since_ms: u64,
}

/// The ledger of one process.
#[derive(Debug, Default)]
pub struct Ledger {
    vms: HashMap<u64, Vm>,
    owners: HashMap<OwnerKey, Owner>,
}

impl Ledger {
    /// Enters a report's sums. Says whether its steps may be applied.
    pub fn report(&mut self, report: &Report, now_ms: u64) -> Continuity {
        let vm = self.vms.entry(report.vm).or_default();
        if report.sequence <= vm.sequence {
            return Continuity::Repeated;
        }
        // One that was taken for dead has to list its bookings again.
        let is_known = report.sequence == vm.sequence + 1 && !vm.is_retired;
        let is_next = is_known || report.complete;
        vm.is_retired &= !is_next;
        vm.sequence = report.sequence;
        vm.heard_ms = now_ms;
        for sum in &report.sums {
            let lanes = Lanes { a: sum.a, b: sum.b };
            if vm.sums.insert(sum.owner, lanes) != Some(lanes) {
                self.owners.entry(sum.owner).or_default().quiet_since_ms = now_ms;
            }
        }
        for step in &report.steps {
            if let Step::WrittenOff(sum) = step {
                let lanes = Lanes { a: sum.a, b: sum.b };
                vm.written_off.insert(sum.owner, lanes);
            }
        }
        if report.complete {
            let mut steps = report.steps.iter();
            vm.is_leaving = report.steps.contains(&Step::Leave);
            vm.is_retired = vm.is_leaving && !steps.any(|step| matches!(step, Step::Book(_)));
        }
        if is_next {
            Continuity::Next
        } else {
            Continuity::Gap
        }
    }

    /// What the lanes hold of nobody, by owner: sums of VMs that are gone, leaks, less what live
    /// VMs have taken out for them.
    #[must_use]
    pub fn orphaned(&self) -> Vec<Sum> {
        let mut orphaned: BTreeMap<OwnerKey, Lanes> = BTreeMap::new();
        let settled = self.owners.iter().map(|(key, owner)| (key, &owner.settled));
        let of_vms = self.vms.values().flat_map(|vm| {
            let sums = if vm.is_retired {
                &vm.sums
            } else {
                &vm.written_off
            };
            sums.iter()
        });
        for (owner, lanes) in settled.chain(of_vms) {
            let sum = orphaned.entry(*owner).or_default();
            *sum = sum.plus(*lanes);
        }
        // What is counted more than once goes with the entries of a board.
        orphaned
            .values_mut()
            .for_each(|lanes| *lanes = lanes.in_full());
        orphaned.retain(|_, lanes| *lanes != Lanes::default());
        let sum = |(owner, Lanes { a, b })| Sum { owner, a, b };
        orphaned.into_iter().map(sum).collect()
    }

    /// What the lanes of an owner are known to hold.
    #[must_use]
    pub fn booked(&self, owner: &OwnerKey) -> Lanes {
        let settled = self
            .owners
            .get(owner)
            .map_or_else(Lanes::default, |o| o.settled);
        let sums = self.vms.values().filter_map(|vm| vm.sums.get(owner));
        sums.fold(settled, |sum, lanes| sum.plus(*lanes))
    }

    /// Compares with the lanes as Envoy shows them. Returns what was entered as leaked, if
    /// anything.
    pub fn compare(&mut self, owner: OwnerKey, seen: Lanes, now_ms: u64) -> Option<Lanes> {
        let booked = self.booked(&owner);
        let entry = self.owners.entry(owner).or_default();
        if entry.seen != seen {
            entry.seen = seen;
            entry.quiet_since_ms = now_ms;
            return None;
        }
        let is_quiet = now_ms.saturating_sub(entry.quiet_since_ms) >= QUIET_MS;
        let leak = seen.minus(booked);
        if !is_quiet || leak == Lanes::default() {
            return None;
        }
        entry.settled = entry.settled.plus(leak);
        Some(leak)
    }

    /// Retires VMs that were last heard before `before_ms`, those that are leaving before
    /// `leaving_before_ms`, and names them: their bookings are nobody's. Their sums count on, and
    /// go on from there should they come back.
    pub fn retire(&mut self, before_ms: u64, leaving_before_ms: u64) -> Vec<Retired> {
        let mut retired = Vec::new();
        for (id, vm) in &mut self.vms {
            let before_ms = if vm.is_leaving {
                leaving_before_ms
            } else {
                before_ms
            };
            if !vm.is_retired && vm.heard_ms < before_ms {
                vm.is_retired = true;
                retired.push(Retired {
                    vm: *id,
                    was_leaving: vm.is_leaving,
                });
            }
        }
        self.settle();
        retired
    }

    /// Adds up the longest silent VMs, once there are too many.
    fn settle(&mut self) {
        let silent = |(id, vm): (&u64, &Vm)| vm.is_retired.then_some((vm.heard_ms, *id));
        let mut silent: Vec<(u64, u64)> = self.vms.iter().filter_map(silent).collect();
        silent.sort_unstable();
        let excess = silent.len().saturating_sub(MAX_SILENT);
        for (_, id) in silent.into_iter().take(excess) {
            for (owner, lanes) in self.vms.remove(&id).into_iter().flat_map(|vm| vm.sums) {
                let entry = self.owners.entry(owner).or_default();
                entry.settled = entry.settled.plus(lanes);
            }
        }
    }

    /// VMs heard of that are not retired.
    pub fn vms(&self) -> impl Iterator<Item = u64> + '_ {
        let live = self.vms.iter().filter(|(_, vm)| !vm.is_retired);
        live.map(|(id, _)| *id)
    }

    /// Owners that were ever booked on or shown.
    pub fn owners(&self) -> impl Iterator<Item = OwnerKey> + '_ {
        self.owners.keys().copied()
    }

    /// The lanes of an owner as Envoy last showed them.
    #[must_use]
    pub fn seen(&self, owner: &OwnerKey) -> Lanes {
        let owner = self.owners.get(owner);
        owner.map_or_else(Lanes::default, |o| o.seen)
    }

    /// Forgets owners that left the worker table.
    pub fn keep(&mut self, mut is_known: impl FnMut(&OwnerKey) -> bool) {
        self.owners.retain(|owner, _| is_known(owner));
        for vm in self.vms.values_mut() {
            vm.sums.retain(|owner, _| is_known(owner));
            vm.written_off.retain(|owner, _| is_known(owner));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::OwnerId;
    use crate::load::Leg;
    use crate::report::Booked;

    const OWNER: OwnerKey = OwnerKey {
        pool: 0,
        id: OwnerId { worker: 1, rank: 0 },
    };

    const MISSED: Retired = Retired {
        vm: 1,
        was_leaving: false,
    };

    /// A VM and the gauges it shares with others.
    struct Vm {
        id: u64,
        sequence: u64,
        sum: Sum,
    }

    impl Vm {
        fn new(id: u64) -> Self {
            Self {
                id,
                sequence: 0,
                sum: Sum::new(OWNER),
            }
        }

        fn book(&mut self, gauges: &mut Lanes) -> Leg {
            let (leg, delta) = Leg::book(100, 7);
            self.add(delta, gauges);
            leg
        }

        fn add(&mut self, delta: crate::load::Delta, gauges: &mut Lanes) {
            self.sum.add(delta);
            gauges.a = gauges.a.wrapping_add_signed(delta.a);
            gauges.b = gauges.b.wrapping_add_signed(delta.b);
        }

        fn report(&mut self) -> Report {
            self.sequence += 1;
            Report {
                vm: self.id,
                sequence: self.sequence,
                sums: vec![self.sum],
                ..Report::default()
            }
        }
    }

    #[test]
    fn reported_sums_equal_the_lanes_though_reports_are_lost_or_repeated() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let (mut one, mut two) = (Vm::new(1), Vm::new(2));
        let mut leg = one.book(&mut gauges);
        two.book(&mut gauges);
        let first = one.report();
        assert_eq!(ledger.report(&first, 0), Continuity::Next);
        assert_eq!(ledger.report(&first, 1), Continuity::Repeated);
        assert_eq!(ledger.report(&two.report(), 2), Continuity::Next);
        assert_eq!(ledger.booked(&OWNER), gauges);
        one.add(leg.first_token(), &mut gauges);
        one.report();
        one.add(leg.release(), &mut gauges);
        assert_eq!(ledger.report(&one.report(), 3), Continuity::Gap);
        assert_eq!(ledger.booked(&OWNER), gauges);
        assert_eq!(ledger.booked(&OWNER).load().waiting, 1);
    }

    #[test]
    fn a_dead_vm_keeps_its_sums_and_its_unreported_rest_is_found() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let mut vm = Vm::new(1);
        vm.book(&mut gauges);
        ledger.report(&vm.report(), 0);
        vm.book(&mut gauges);
        assert_eq!(ledger.retire(1, 0), [MISSED]);
        assert_eq!(ledger.booked(&OWNER).load().waiting, 1);
        // The lanes show one more; it counts once all has been quiet for a while.
        assert_eq!(ledger.compare(OWNER, gauges, 1_000), None);
        assert_eq!(ledger.compare(OWNER, gauges, 2_000), None);
        let leak = ledger.compare(OWNER, gauges, 3_000).unwrap();
        assert_eq!(leak.load().waiting, 1);
        assert_eq!(ledger.booked(&OWNER), gauges);
        assert_eq!(ledger.compare(OWNER, gauges, 9_000), None);
    }

    #[test]
    fn what_a_dead_vm_left_is_written_off_by_a_live_one() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let (mut dead, mut live) = (Vm::new(1), Vm::new(2));
        dead.book(&mut gauges);
        let mut leg = live.book(&mut gauges);
        ledger.report(&dead.report(), 0);
        ledger.report(&live.report(), 0);
        assert_eq!(ledger.orphaned(), []);
        // One booking more that nobody heard of.
        dead.book(&mut gauges);
        ledger.report(&live.report(), 1);
        assert_eq!(ledger.retire(1, 0), [MISSED]);
        assert_eq!(ledger.compare(OWNER, gauges, 1_000), None);
        assert!(ledger.compare(OWNER, gauges, 4_000).is_some());
        let left = ledger.orphaned();
        assert_eq!(
            Lanes {
                a: left[0].a,
                b: left[0].b
            }
            .load()
            .waiting,
            2
        );
        // The live one takes it out, twice: the bridge changed hands meanwhile.
        let mut written_off = Sum::new(OWNER);
        let mut write_off = |ledger: &mut Ledger, live: &mut Vm, gauges: &mut Lanes, sum: &Sum| {
            live.add(sum.removal(), gauges);
            written_off.add(sum.removal());
            let report = Report {
                steps: vec![Step::WrittenOff(written_off)],
                ..live.report()
            };
            ledger.report(&report, 5_000);
            assert_eq!(ledger.booked(&OWNER), *gauges);
        };
        write_off(&mut ledger, &mut live, &mut gauges, &left[0]);
        assert_eq!(ledger.orphaned(), []);
        write_off(&mut ledger, &mut live, &mut gauges, &left[0]);
        let back = ledger.orphaned();
        let (a, b) = (left[0].a.wrapping_neg(), left[0].b.wrapping_neg());
        assert_eq!(back[0], Sum { a, b, ..left[0] });
        write_off(&mut ledger, &mut live, &mut gauges, &back[0]);
        assert_eq!(ledger.orphaned(), []);
        // It ends properly: nothing is left of either.
        live.add(leg.release(), &mut gauges);
        let report = Report {
            complete: true,
            steps: vec![Step::WrittenOff(written_off), Step::Leave],
            ..live.report()
        };
        ledger.report(&report, 6_000);
        assert_eq!((gauges, ledger.booked(&OWNER)), Default::default());
        assert_eq!((ledger.orphaned(), ledger.vms().count()), (vec![], 0));
        assert!(ledger.retire(9_000, 9_000).is_empty(), "it is not missed");
    }

    #[test]
    fn a_vm_that_leaves_is_not_missed_while_it_has_requests() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let mut vm = Vm::new(1);
        let mut leg = vm.book(&mut gauges);
        let booked = Booked {
            request: 1,
            owner: OWNER,
            decoding: false,
            prefill_tokens: 100,
            blocks: 7,
            prefix: None,
            hashes: Vec::new(),
            evidence: None,
            session: None,
        };
        let leaving = Report {
            complete: true,
            steps: vec![Step::Book(Box::new(booked)), Step::Leave],
            ..vm.report()
        };
        ledger.report(&leaving, 0);
        assert!(ledger.retire(9_000, 0).is_empty());
        assert_eq!(ledger.orphaned(), []);
        vm.add(leg.release(), &mut gauges);
        let left = Report {
            complete: true,
            steps: vec![Step::Leave],
            ..vm.report()
        };
        ledger.report(&left, 9_000);
        assert_eq!((ledger.vms().count(), ledger.booked(&OWNER)), (0, gauges));
        assert!(ledger.retire(99_000, 99_000).is_empty());
        // One that never comes to that is given up after a longer time.
        ledger.report(&Report { vm: 2, ..leaving }, 0);
        let given_up = Retired {
            vm: 2,
            was_leaving: true,
        };
        assert_eq!(ledger.retire(9_000, 1), [given_up]);
    }

    #[test]
    fn a_vm_that_comes_back_counts_once_and_lists_its_bookings_first() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let mut vm = Vm::new(1);
        let mut leg = vm.book(&mut gauges);
        ledger.report(&vm.report(), 0);
        assert_eq!(ledger.retire(1, 0), [MISSED]);
        assert!(ledger.retire(1, 0).is_empty());
        assert_eq!(ledger.vms().count(), 0);
        vm.add(leg.first_token(), &mut gauges);
        assert_eq!(ledger.report(&vm.report(), 5), Continuity::Gap);
        assert_eq!(ledger.booked(&OWNER), gauges);
        let whole = Report {
            complete: true,
            ..vm.report()
        };
        assert_eq!(ledger.report(&whole, 6), Continuity::Next);
        vm.add(leg.release(), &mut gauges);
        assert_eq!(ledger.report(&vm.report(), 7), Continuity::Next);
        assert_eq!(ledger.booked(&OWNER), Lanes::default());
        assert_eq!(ledger.vms().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn sums_of_many_dead_vms_are_added_up() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        for id in 0..200 {
            let mut vm = Vm::new(id);
            vm.book(&mut gauges);
            ledger.report(&vm.report(), id);
        }
        assert_eq!(ledger.retire(1_000, 0).len(), 200);
        assert_eq!(ledger.vms.len(), MAX_SILENT);
        assert_eq!(ledger.booked(&OWNER), gauges);
    }

    #[test]
    fn traffic_is_never_taken_for_a_leak() {
        let (mut ledger, mut gauges) = (Ledger::default(), Lanes::default());
        let mut vm = Vm::new(1);
        for now_ms in (0..20_000).step_by(500) {
            let mut leg = vm.book(&mut gauges);
            // Shown before it is reported.
            assert_eq!(ledger.compare(OWNER, gauges, now_ms), None);
            ledger.report(&vm.report(), now_ms);
            vm.add(leg.release(), &mut gauges);
            ledger.report(&vm.report(), now_ms);
        }
    }
}
