//! Items by number, with reuse of freed numbers. Memory comes in chunks, so that growing neither
//! copies what is there nor takes twice its size for a while.

/// "No item". Reading it gives a default item, writing to it is lost.
pub(super) const NIL: u32 = u32::MAX;

/// Items to a chunk.
const CHUNK: usize = 1 << CHUNK_BITS;
const CHUNK_BITS: u32 = 8;

/// A slab. Numbers are handed out by [`Slab::insert`] and stay valid until [`Slab::remove`] or
/// [`Slab::compact`].
#[derive(Debug, Default)]
pub(super) struct Slab<T> {
    chunks: Vec<Vec<T>>,
    /// Numbers handed out so far, free ones included.
    numbers: u32,
    free: Vec<u32>,
    nil: T,
    /// Where writes to [`NIL`] go.
    lost: T,
}

impl<T: Default> Slab<T> {
    /// Stores an item and returns its number.
    pub(super) fn insert(&mut self, item: T) -> u32 {
        if let Some(id) = self.free.pop() {
            *self.at_mut(id) = item;
            return id;
        }
        let id = self.numbers;
        if (id as usize).is_multiple_of(CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.push(item);
        }
        self.numbers += 1;
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
    #[inline]
    pub(super) fn at(&self, id: u32) -> &T {
        let chunk = self.chunks.get((id >> CHUNK_BITS) as usize);
        chunk
            .and_then(|chunk| chunk.get(id as usize % CHUNK))
            .unwrap_or(&self.nil)
    }

    /// The item of a number, to change it.
    #[inline]
    pub(super) fn at_mut(&mut self, id: u32) -> &mut T {
        let chunk = self.chunks.get_mut((id >> CHUNK_BITS) as usize);
        chunk
            .and_then(|chunk| chunk.get_mut(id as usize % CHUNK))
            .unwrap_or(&mut self.lost)
    }

    /// Items in use.
    pub(super) fn len(&self) -> usize {
        self.numbers as usize - self.free.len()
    }

    /// All items with their numbers, default ones for those that are free.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> + Clone {
        (0..).zip(self.chunks.iter().flatten())
    }

    /// All items, to change them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.chunks.iter_mut().flatten()
    }

    /// Bytes taken from the allocator.
    pub(super) fn bytes(&self) -> usize {
        let items = self.chunks.len() * CHUNK * size_of::<T>();
        items
            + self.chunks.capacity() * size_of::<Vec<T>>()
            + self.free.capacity() * size_of::<u32>()
    }

    /// Bytes of the items in use.
    pub(super) fn used_bytes(&self) -> usize {
        self.len() * size_of::<T>()
    }

    /// Numbers the items anew without gaps and in the same order, and gives back what memory that
    /// frees. Returns the numbers by their old ones; those of free ones mean nothing.
    pub(super) fn compact(&mut self) -> Vec<u32> {
        let mut is_free = vec![false; self.numbers as usize];
        for id in self.free.drain(..) {
            if let Some(free) = is_free.get_mut(id as usize) {
                *free = true;
            }
        }
        self.free.shrink_to_fit();
        let chunks = std::mem::take(&mut self.chunks);
        self.numbers = 0;
        let mut ids = Vec::with_capacity(is_free.len());
        for (item, free) in chunks.into_iter().flatten().zip(is_free) {
            ids.push(self.numbers);
            if !free {
                self.insert(item);
            }
        }
        ids
    }
}
