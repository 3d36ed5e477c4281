//! The queue as its rules say it, without any structure: the reference for tests.

use super::class::{Full, Order, Usage};
use super::policy::Request;
use super::profile::Profile;

/// Requests in the order of their arrival.
#[derive(Debug)]
pub(super) struct Naive {
    profile: Profile,
    waiting: Vec<(u64, Request)>,
    credit: Vec<u64>,
    cursor: usize,
    carried: Option<usize>,
}

impl Naive {
    pub(super) fn new(profile: Profile) -> Self {
        Self {
            credit: vec![0; profile.classes().len()],
            profile,
            waiting: Vec::new(),
            cursor: 0,
            carried: None,
        }
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self.waiting.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    pub(super) fn usage(&self, class: usize) -> Usage {
        let mut usage = Usage::default();
        for (_, request) in self.of(class) {
            usage.requests += 1;
            usage.tokens += u64::from(request.tokens);
            usage.cached_tokens += u64::from(request.cached_tokens);
        }
        usage
    }

    pub(super) fn push(&mut self, id: u64, request: Request, workers: u64) -> Result<(), Full> {
        let usage = self.usage(request.class);
        self.profile.classes()[request.class]
            .limits
            .admit(&usage, workers)?;
        self.waiting.push((id, request));
        Ok(())
    }

    pub(super) fn remove(&mut self, id: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|(known, _)| *known != id);
        self.forget_credit();
        before != self.waiting.len()
    }

    pub(super) fn expire(&mut self, now_ns: u64) -> Vec<u64> {
        let ends = |r: &Request| r.until_ns.min(r.due_ns.unwrap_or(u64::MAX));
        let is_over = |(id, r): &(u64, Request)| (ends(r) <= now_ns).then_some(*id);
        let mut over: Vec<u64> = self.waiting.iter().filter_map(is_over).collect();
        self.waiting.retain(|(id, _)| !over.contains(id));
        self.forget_credit();
        over.sort_unstable();
        over
    }

    pub(super) fn next(&mut self, fits: impl Fn(&Request) -> bool) -> Option<u64> {
        let carried = self.carried.take();
        if self.waiting.is_empty() {
            return None;
        }
        let count = self.credit.len();
        let heads: Vec<Option<(u64, u64)>> = (0..count).map(|c| self.head(c, &fits)).collect();
        let pays = |credit: &[u64], c: usize| heads[c].is_some_and(|(_, cost)| cost <= credit[c]);
        if let Some(class) = carried.filter(|c| pays(&self.credit, *c)) {
            return self.take(class, heads[class]?);
        }
        let ring: Vec<usize> = (0..count).map(|i| (self.cursor + i) % count).collect();
        for class in ring.iter().copied().filter(|c| heads[*c].is_some()) {
            if !pays(&self.credit, class) {
                self.credit[class] += self.profile.classes()[class].quantum;
            }
            if pays(&self.credit, class) {
                return self.take(class, heads[class]?);
            }
        }
        if heads.iter().all(Option::is_none) {
            return None;
        }
        loop {
            for class in (0..count).filter(|c| heads[*c].is_some()) {
                self.credit[class] += self.profile.classes()[class].quantum;
            }
            if let Some(class) = ring.iter().copied().find(|c| pays(&self.credit, *c)) {
                return self.take(class, heads[class]?);
            }
        }
    }

    fn take(&mut self, class: usize, (id, cost): (u64, u64)) -> Option<u64> {
        self.cursor = (class + 1) % self.credit.len();
        self.credit[class] -= cost;
        self.waiting.retain(|(known, _)| *known != id);
        self.forget_credit();
        self.carried = (self.credit[class] > 0).then_some(class);
        Some(id)
    }

    fn of(&self, class: usize) -> impl Iterator<Item = &(u64, Request)> {
        self.waiting.iter().filter(move |(_, r)| r.class == class)
    }

    fn forget_credit(&mut self) {
        for class in 0..self.credit.len() {
            if self.of(class).next().is_none() {
                self.credit[class] = 0;
            }
        }
    }

    /// The first of the class whose lane's first fits, and what it costs.
    fn head(&self, class: usize, fits: &impl Fn(&Request) -> bool) -> Option<(u64, u64)> {
        let order = self.profile.classes()[class].order;
        let goes_before = |a: &Request, b: &Request| {
            let due = |r: &Request| r.due_ns.unwrap_or(u64::MAX);
            let by_score = match order {
                Order::Fcfs => (a.priority.max(0.0) - a.arrival_s)
                    .total_cmp(&(b.priority.max(0.0) - b.arrival_s)),
                Order::Lcfs => (a.priority.max(0.0) + a.arrival_s)
                    .total_cmp(&(b.priority.max(0.0) + b.arrival_s)),
                Order::Wspt => ((1.0 + a.priority.max(0.0)) / f64::from(a.cost()))
                    .total_cmp(&((1.0 + b.priority.max(0.0)) / f64::from(b.cost()))),
            };
            a.strict
                .cmp(&b.strict)
                .then(due(b).cmp(&due(a)))
                .then(by_score)
                .is_gt()
        };
        let first = |among: &mut dyn Iterator<Item = &(u64, Request)>| {
            let mut best: Option<(u64, Request)> = None;
            for (id, request) in among {
                if best.is_none_or(|(_, best)| goes_before(request, &best)) {
                    best = Some((*id, *request));
                }
            }
            best
        };
        let is_first_of_lane = |(id, request): &&(u64, Request)| {
            let mut lane = self.of(class).filter(|(_, r)| r.owner == request.owner);
            first(&mut lane).is_some_and(|(best, _)| best == *id)
        };
        let mut able = self
            .of(class)
            .filter(is_first_of_lane)
            .filter(|(_, request)| fits(request));
        first(&mut able).map(|(id, request)| (id, request.cost().into()))
    }
}
