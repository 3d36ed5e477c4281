//! The queue of one pool.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;

use hashbrown::HashMap;

use super::class::{Class, Full, Usage};
use super::key::Key;
use super::profile::Profile;
use crate::id::OwnerId;

/// A request that is to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Position of its class in the profile.
    pub class: usize,
    /// The only owner that can take it, if it is so.
    pub owner: Option<OwnerId>,
    /// Prompt tokens.
    pub tokens: u32,
    /// Prompt tokens that the best owner has cached.
    pub cached_tokens: u32,
    /// When it came, seconds since any moment that doesn't change.
    pub arrival_s: f64,
    /// Its priority; below 0 counts as 0.
    pub priority: f64,
    /// Its tier: a higher one goes before all lower ones of its class.
    pub strict: u32,
    /// When it has to go at the latest; earlier deadlines of a tier go first.
    pub due_ns: Option<u64>,
    /// When it gives up waiting, which orders nothing.
    pub until_ns: u64,
}

impl Request {
    /// Prompt tokens to compute, at least 1.
    #[must_use]
    pub fn cost(&self) -> u32 {
        self.tokens.saturating_sub(self.cached_tokens).max(1)
    }

    fn ends_ns(&self) -> u64 {
        self.due_ns
            .map_or(self.until_ns, |due| due.min(self.until_ns))
    }
}

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry<Id> {
    /// Its name.
    pub id: Id,
    /// The request.
    pub request: Request,
}

/// Requests that wait, by class.
#[derive(Clone, Debug)]
pub struct PolicyQueue<Id> {
    profile: Profile,
    classes: Vec<Waiting<Id>>,
    places: HashMap<Id, Place>,
    /// When they give up, earliest first.
    ends: BTreeSet<(u64, Id)>,
    /// Number of the last one that came.
    last: u64,
    /// The class that is looked at first.
    cursor: usize,
    /// The class that went last and has credit left.
    carried: Option<usize>,
}

/// What waits in one class.
#[derive(Clone, Debug)]
struct Waiting<Id> {
    /// By the only owner that can take them.
    lanes: BTreeMap<Option<OwnerId>, BTreeMap<Key, Entry<Id>>>,
    usage: Usage,
    /// Prompt tokens that it may send on.
    deficit: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    class: usize,
    owner: Option<OwnerId>,
    key: Key,
}

/// The first of a class that can go.
#[derive(Clone, Copy, Debug)]
struct Head<Id> {
    id: Id,
    cost: u64,
}

impl<Id: Copy + Eq + Hash + Ord> PolicyQueue<Id> {
    /// An empty queue.
    #[must_use]
    pub fn new(profile: Profile) -> Self {
        let classes = profile.classes().iter().map(|_| Waiting::default());
        Self {
            classes: classes.collect(),
            profile,
            places: HashMap::new(),
            ends: BTreeSet::new(),
            last: 0,
            cursor: 0,
            carried: None,
        }
    }

    /// Its classes.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether a request waits.
    #[must_use]
    pub fn contains(&self, id: Id) -> bool {
        self.places.contains_key(&id)
    }

    /// What of a class waits.
    #[must_use]
    pub fn usage(&self, class: usize) -> Usage {
        self.classes
            .get(class)
            .map_or_else(Usage::default, |c| c.usage)
    }

    /// All requests that wait, class by class.
    pub fn entries(&self) -> impl Iterator<Item = &Entry<Id>> {
        let lanes = self.classes.iter().flat_map(|class| class.lanes.values());
        lanes.flat_map(BTreeMap::values)
    }

    /// Takes a request in, in a pool of so many workers. One of the same name is replaced.
    ///
    /// # Errors
    /// When its class is full.
    pub fn push(&mut self, id: Id, request: Request, workers: u64) -> Result<(), Full> {
        self.remove(id);
        let last = self.profile.classes().len().saturating_sub(1);
        let at = request.class.min(last);
        let (Some(class), Some(waiting)) =
            (self.profile.classes().get(at), self.classes.get_mut(at))
        else {
            return Ok(());
        };
        class.limits.admit(&waiting.usage, workers)?;
        self.last += 1;
        let place = Place {
            class: at,
            owner: request.owner,
            key: Key::new(class.order, &request, self.last),
        };
        let entry = Entry { id, request };
        let lane = waiting.lanes.entry(request.owner).or_default();
        lane.insert(place.key, entry);
        waiting.usage.add(request.tokens, request.cached_tokens);
        self.places.insert(id, place);
        self.ends.insert((request.ends_ns(), id));
        Ok(())
    }

    /// Takes a request out.
    pub fn remove(&mut self, id: Id) -> Option<Entry<Id>> {
        let Place { class, owner, key } = self.places.remove(&id)?;
        let waiting = self.classes.get_mut(class)?;
        let lane = waiting.lanes.get_mut(&owner)?;
        let entry = lane.remove(&key)?;
        if lane.is_empty() {
            waiting.lanes.remove(&owner);
        }
        let Request {
            tokens,
            cached_tokens,
            ..
        } = entry.request;
        waiting.usage.remove(tokens, cached_tokens);
        if waiting.lanes.is_empty() {
            waiting.deficit = 0;
        }
        self.ends.remove(&(entry.request.ends_ns(), id));
        Some(entry)
    }

    /// Takes out those that have waited too long.
    pub fn expire(&mut self, now_ns: u64) -> Vec<Entry<Id>> {
        let mut expired = Vec::new();
        while let Some((ends_ns, id)) = self.ends.first().copied()
            && ends_ns <= now_ns
        {
            self.ends.pop_first();
            expired.extend(self.remove(id));
        }
        expired
    }

    /// Takes out the next one among those that fit. `fits` says whether a worker has room for the
    /// first of a lane; those behind it wait with it.
    pub fn next(&mut self, mut fits: impl FnMut(&Class, &Entry<Id>) -> bool) -> Option<Entry<Id>> {
        let count = self.classes.len();
        if self.is_empty() || count == 0 {
            self.carried = None;
            return None;
        }
        let mut heads: Vec<Option<Option<Head<Id>>>> = vec![None; count];
        // Credit is spent before the next class has its turn.
        if let Some(carried) = self.carried.take() {
            let head = self.head(carried, &mut fits);
            if let Some(head) = head.filter(|head| self.affords(carried, head)) {
                return self.take(carried, head);
            }
            if let Some(known) = heads.get_mut(carried) {
                *known = Some(head);
            }
        }
        let ring = (0..count).map(|i| (self.cursor + i) % count);
        let ring: Vec<usize> = ring.collect();
        for class in &ring {
            let Some(known) = heads.get_mut(*class) else {
                continue;
            };
            let head = match *known {
                Some(head) => head,
                None => *known.insert(self.head(*class, &mut fits)),
            };
            let Some(head) = head else { continue };
            if self.affords(*class, &head) {
                return self.take(*class, head);
            }
            self.credit(*class, 1);
            if self.affords(*class, &head) {
                return self.take(*class, head);
            }
        }
        // The fewest further rounds after which somebody can go.
        let able: Vec<(usize, Head<Id>)> = ring
            .into_iter()
            .filter_map(|class| Some((class, (*heads.get(class)?)??)))
            .collect();
        let rounds = able.iter().map(|(class, head)| self.missing(*class, head));
        let rounds = rounds.min()?;
        for (class, _) in &able {
            self.credit(*class, rounds);
        }
        let (class, head) = able
            .into_iter()
            .find(|(class, head)| self.affords(*class, head))?;
        self.take(class, head)
    }

    /// The first of a class that can go.
    fn head(
        &self,
        class: usize,
        fits: &mut impl FnMut(&Class, &Entry<Id>) -> bool,
    ) -> Option<Head<Id>> {
        let config = self.profile.classes().get(class)?;
        let lanes = self.classes.get(class)?.lanes.values();
        let firsts = lanes.filter_map(BTreeMap::first_key_value);
        let (_, first) = firsts
            .filter(|(_, entry)| fits(config, entry))
            .min_by_key(|(key, _)| **key)?;
        Some(Head {
            id: first.id,
            cost: first.request.cost().into(),
        })
    }

    fn affords(&self, class: usize, head: &Head<Id>) -> bool {
        self.classes
            .get(class)
            .is_some_and(|c| head.cost <= c.deficit)
    }

    fn quantum(&self, class: usize) -> u64 {
        let class = self.profile.classes().get(class);
        class.map_or(1, |class| class.quantum.max(1))
    }

    fn credit(&mut self, class: usize, rounds: u64) {
        let quantum = self.quantum(class);
        if let Some(class) = self.classes.get_mut(class) {
            class.deficit = class.deficit.saturating_add(quantum.saturating_mul(rounds));
        }
    }

    /// Rounds until a class can pay for its head.
    fn missing(&self, class: usize, head: &Head<Id>) -> u64 {
        let deficit = self.classes.get(class).map_or(0, |class| class.deficit);
        head.cost
            .saturating_sub(deficit)
            .div_ceil(self.quantum(class))
    }

    fn take(&mut self, class: usize, head: Head<Id>) -> Option<Entry<Id>> {
        self.cursor = (class + 1) % self.classes.len().max(1);
        if let Some(class) = self.classes.get_mut(class) {
            class.deficit = class.deficit.saturating_sub(head.cost);
        }
        let entry = self.remove(head.id);
        let has_credit = self.classes.get(class).is_some_and(|c| c.deficit > 0);
        self.carried = has_credit.then_some(class);
        entry
    }
}

impl<Id> Default for Waiting<Id> {
    fn default() -> Self {
        Self {
            lanes: BTreeMap::new(),
            usage: Usage::default(),
            deficit: 0,
        }
    }
}
