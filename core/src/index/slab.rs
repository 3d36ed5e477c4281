//! Items by number, with reuse of freed numbers.

/// "No item". Reading it gives a default item, writing to it is lost.
pub(super) const NIL: u32 = u32::MAX;

/// A slab. Numbers are handed out by [`Slab::insert`] and stay valid until [`Slab::remove`].
#[derive(Debug, Default)]
pub(super) struct Slab<T> {
    items: Vec<T>,
    free: Vec<u32>,
    nil: T,
}

impl<T: Default> Slab<T> {
    /// Stores an item and returns its number.
    pub(super) fn insert(&mut self, item: T) -> u32 {
        if let Some(id) = self.free.pop() {
            *self.at_mut(id) = item;
            return id;
        }
        let id = u32::try_from(self.items.len()).unwrap_or(NIL);
        self.items.push(item);
        id
    }

    /// Frees a number and returns its item.
    pub(super) fn remove(&mut self, id: u32) -> T {
        let item = std::mem::take(self.at_mut(id));
        if id != NIL {
            self.free.push(id);
        }
        item
    }

    /// The item of a number.
    pub(super) fn at(&self, id: u32) -> &T {
        self.items.get(id as usize).unwrap_or(&self.nil)
    }

    /// The item of a number, to change it.
    pub(super) fn at_mut(&mut self, id: u32) -> &mut T {
        self.items.get_mut(id as usize).unwrap_or(&mut self.nil)
    }

    /// Items in use.
    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}
