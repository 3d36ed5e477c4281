//! Reading pages. Nothing here trusts the bytes: a broken page reads as one that holds less.

use crate::id::Tier;
use crate::page::{HEADER, VERSION};

/// A page whose header has been checked.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    bytes: &'a [u8],
}

/// A unit of a page.
#[derive(Clone, Copy, Debug)]
pub struct Unit<'a> {
    /// Position from which its blocks are units of their own, or `WHOLE`.
    pub split: u8,
    runs: &'a [u8],
    left: u16,
}

/// A run of a unit.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Position of the first block in its group.
    pub position: u8,
    /// Number of its owner set in the page.
    pub set: u16,
    /// Fingerprint of the first block.
    pub head: u32,
    /// Fingerprints of the others.
    body: &'a [u8],
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let (word, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u16::from_le_bytes(*word))
}

impl<'a> Page<'a> {
    /// A page of this epoch; `None` for another epoch or version, or fewer bytes than a header.
    #[must_use]
    pub fn new(bytes: &'a [u8], epoch: u32) -> Option<Self> {
        let (header, _) = bytes.split_first_chunk::<HEADER>()?;
        let [_, version, _, _, e0, e1, e2, e3, ..] = *header;
        let same = version == VERSION && u32::from_le_bytes([e0, e1, e2, e3]) == epoch;
        same.then_some(Self { bytes })
    }

    /// A page whose header has been checked before.
    #[must_use]
    pub(crate) fn assume(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The level at which this page's id was made.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.bytes.first().copied().unwrap_or(0)
    }

    /// The unit with this fingerprint.
    #[must_use]
    pub fn unit(&self, fingerprint: u32) -> Option<Unit<'a>> {
        let units = usize::from(u16_at(self.bytes, 2)?);
        let keys_end = HEADER + 4 * units;
        let keys = self.bytes.get(HEADER..keys_end)?;
        let wanted = fingerprint.to_le_bytes();
        let (keys, _) = keys.as_chunks::<4>();
        let i = keys.iter().position(|key| *key == wanted)?;
        let at = usize::from(u16_at(self.bytes, keys_end + 2 * i)?);
        let (head, runs) = self.bytes.get(at..)?.split_first_chunk::<4>()?;
        let [n0, n1, split, _] = *head;
        Some(Unit {
            split,
            runs,
            left: u16::from_le_bytes([n0, n1]),
        })
    }

    /// Sets the bits of a set's owners: `bits` has `words` words for each tier, and an owner on a
    /// tier counts for the slower ones too. Slots past the words are ignored.
    pub fn mark(&self, set: u16, words: usize, bits: &mut [u64]) {
        let _ = self.try_mark(set, words, bits);
    }

    fn try_mark(&self, set: u16, words: usize, bits: &mut [u64]) -> Option<()> {
        let offsets = usize::from(u16_at(self.bytes, 12)?);
        if set >= u16_at(self.bytes, 14)? {
            return None;
        }
        let at = usize::from(u16_at(self.bytes, offsets + 2 * usize::from(set))?);
        let (head, rest) = self.bytes.get(at..)?.split_first_chunk::<2>()?;
        let head = u16::from_le_bytes(*head);
        let n = usize::from(head & 0x3fff);
        if head >> 14 == 0 {
            let (members, _) = rest.get(..2 * n)?.as_chunks::<2>();
            for member in members {
                let member = u16::from_le_bytes(*member);
                let (word, bit) = (usize::from(member >> 8), member >> 2 & 63);
                if word < words {
                    set_from(bits, words, usize::from(member & 3), word, 1 << bit);
                }
            }
            return Some(());
        }
        let (mask, mut rest) = rest.split_first_chunk::<2>()?;
        let mask = u16::from_le_bytes(*mask);
        for tier in 0..Tier::COUNT {
            if mask & (1 << tier) == 0 {
                continue;
            }
            let (bitmap, after) = rest.split_at_checked(2 * n)?;
            rest = after;
            let (narrow, _) = bitmap.as_chunks::<2>();
            for (i, value) in narrow.iter().enumerate() {
                let value = u64::from(u16::from_le_bytes(*value)) << (16 * (i & 3));
                if value != 0 && i / 4 < words {
                    set_from(bits, words, tier, i / 4, value);
                }
            }
        }
        Some(())
    }
}

/// Sets bits of one word for a tier and all slower ones.
#[inline]
fn set_from(bits: &mut [u64], words: usize, tier: usize, word: usize, value: u64) {
    for t in tier..Tier::COUNT {
        if let Some(w) = bits.get_mut(t * words + word) {
            *w |= value;
        }
    }
}

impl<'a> Iterator for Unit<'a> {
    type Item = Run<'a>;

    #[inline]
    fn next(&mut self) -> Option<Run<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (head, rest) = self.runs.split_first_chunk::<8>()?;
        let [position, length, s0, s1, h0, h1, h2, h3] = *head;
        let (body, rest) = rest.split_at_checked(2 * usize::from(length.saturating_sub(1)))?;
        self.runs = rest;
        Some(Run {
            position,
            set: u16::from_le_bytes([s0, s1]),
            head: u32::from_le_bytes([h0, h1, h2, h3]),
            body,
        })
    }
}

impl Run<'_> {
    /// How many blocks of the run match the prompt's group, of which the first is at position 0.
    #[inline]
    #[must_use]
    pub fn matched(&self, group: &[u64]) -> usize {
        let Some((first, rest)) = group
            .get(usize::from(self.position)..)
            .and_then(<[u64]>::split_first)
        else {
            return 0;
        };
        if self.head != super::head_of(*first) {
            return 0;
        }
        let (body, _) = self.body.as_chunks::<2>();
        let same = |(b, s): &(&[u8; 2], &u64)| u16::from_le_bytes(**b) == super::body_of(**s);
        1 + body.iter().zip(rest).take_while(same).count()
    }
}

#[cfg(test)]
mod tests {
    use super::Page;
    use crate::id::{Slot, Tier};
    use crate::page::encode::{Run, Source, Unit, member, set_bytes};
    use crate::page::image::Image;
    use crate::page::{HEADER, MAX_BYTES, WHOLE};

    fn encode<'a>(
        units: &[Unit],
        level: u8,
        epoch: u32,
        members: impl Fn(u32) -> &'a [u16],
    ) -> (Vec<u8>, usize) {
        let units: Vec<_> = units.iter().cloned().map(Source::Index).collect();
        crate::page::encode::encode(&units, Image::default(), level, epoch, members)
    }

    fn unit(fingerprint: u32, first: u64, length: u64, set: u32) -> Unit {
        let blocks = (first..first + length).map(|b| b.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        Unit {
            fingerprint,
            split: WHOLE,
            runs: vec![Run {
                position: 0,
                set,
                blocks: blocks.collect(),
            }],
        }
    }

    #[test]
    fn a_unit_is_found_and_its_run_matches_as_far_as_the_prompt_agrees() {
        let sets = [vec![member(Slot(3), Tier::Host)]];
        let units = [unit(7, 0, 5, 0), unit(8, 100, 32, 0)];
        let (bytes, left_out) = encode(&units, 4, 99, |s| sets[s as usize].as_slice());
        assert_eq!(left_out, 0);
        assert!(Page::new(&bytes, 98).is_none());
        let page = Page::new(&bytes, 99).unwrap();
        assert_eq!(page.level(), 4);
        assert!(page.unit(9).is_none());
        let run = page.unit(8).unwrap().next().unwrap();
        let mut prompt = units[1].runs[0].blocks.clone();
        assert_eq!(run.matched(&prompt), 32);
        prompt[20] ^= 1 << 20;
        assert_eq!(run.matched(&prompt), 20);
        prompt[0] ^= 1;
        assert_eq!(run.matched(&prompt), 0);
        let mut bits = vec![0; 4];
        page.mark(run.set, 1, &mut bits);
        assert_eq!(bits, [0, 8, 8, 8]);
    }

    #[test]
    fn lists_and_bitmaps_hold_the_same_members() {
        for step in [1_u16, 3, 50] {
            let members: Vec<u16> = (0..1024)
                .step_by(usize::from(step))
                .map(|s| (s << 2) | ((s % 2) * 3))
                .collect();
            let set = [members.clone()];
            let (bytes, _) = encode(&[unit(1, 0, 1, 0)], 0, 0, |s| set[s as usize].as_slice());
            let page = Page::new(&bytes, 0).unwrap();
            let mut bits = vec![0_u64; 64];
            page.mark(0, 16, &mut bits);
            for slot in 0..1024_usize {
                let member = members.iter().find(|m| usize::from(**m >> 2) == slot);
                for tier in 0..4 {
                    let expected = member.is_some_and(|m| usize::from(m & 3) <= tier);
                    assert_eq!(
                        bits[tier * 16 + slot / 64] >> (slot % 64) & 1 == 1,
                        expected
                    );
                }
            }
            assert!(bytes.len() <= HEADER + 6 + 4 + 8 + 2 + set_bytes(&members));
        }
    }

    #[test]
    fn a_full_page_leaves_out_what_does_not_fit() {
        let sets: Vec<Vec<u16>> = (0..100)
            .map(|i| {
                (0..1024_u16)
                    .filter(|s| s % 3 == i % 3)
                    .map(|s| s << 2 | i & 3)
                    .collect()
            })
            .collect();
        let units: Vec<Unit> = (0..2000_u32)
            .map(|i| unit(i, u64::from(i) * 1000, 30, i % 100))
            .collect();
        let (bytes, left_out) = encode(&units, 0, 0, |s| sets[s as usize].as_slice());
        assert!(bytes.len() <= MAX_BYTES);
        assert!(left_out > 1000 && left_out < 2000, "{left_out}");
        let page = Page::new(&bytes, 0).unwrap();
        let kept: Vec<_> = units
            .iter()
            .filter(|u| page.unit(u.fingerprint).is_some())
            .collect();
        assert_eq!(kept.len(), units.len() - left_out);
        for unit in kept {
            let run = page.unit(unit.fingerprint).unwrap().next().unwrap();
            assert_eq!(run.matched(&unit.runs[0].blocks), 30);
        }
    }

    #[test]
    fn units_of_a_page_go_into_the_next_as_they_are() {
        let sets: Vec<Vec<u16>> = (0..4_u16)
            .map(|i| (i..=2 * i).map(|s| member(Slot(s), Tier::Host)).collect())
            .collect();
        let members = |s: u32| sets[s as usize].as_slice();
        let units: Vec<_> = (0..5)
            .map(|i| unit(i, u64::from(i) * 100, 9, i % 4))
            .collect();
        let (before, _) = encode(&units, 4, 99, members);
        // One is gone, one has changed, one of another set is new, and the order is another one.
        let next = [
            unit(9, 900, 3, 2),
            units[4].clone(),
            unit(1, 100, 12, 1),
            units[2].clone(),
            units[3].clone(),
        ];
        let image = Image::new(&before);
        let sources = next.iter().enumerate().map(|(i, unit)| match i {
            0 | 2 => Source::Index(unit.clone()),
            _ => Source::Before(image.unit(unit.fingerprint).unwrap()),
        });
        let sources: Vec<_> = sources.collect();
        let (ours, left_out) = crate::page::encode::encode(&sources, image, 4, 99, members);
        assert_eq!((&ours, left_out), (&encode(&next, 4, 99, members).0, 0));
        assert!(image.unit(9).is_none());
        assert!(Image::new(&[]).unit(1).is_none());
    }

    #[test]
    fn broken_pages_read_as_less_and_never_panic() {
        let sets = [vec![member(Slot(3), Tier::Device)]];
        let (bytes, _) = encode(&[unit(7, 0, 5, 0)], 4, 99, |s| sets[s as usize].as_slice());
        let mut rng = crate::rng::Rng::new(5);
        for _ in 0..20_000 {
            let mut broken = bytes.clone();
            for _ in 0..=rng.below(3) {
                let at = rng.below(broken.len());
                broken[at] = rng.next_u64() as u8;
            }
            broken.truncate(rng.below(bytes.len() + 1));
            let Some(page) = Page::new(&broken, 99) else {
                continue;
            };
            let mut bits = vec![0; 8];
            for run in page.unit(7).into_iter().flatten() {
                let _ = run.matched(&[1, 2, 3]);
                page.mark(run.set, 2, &mut bits);
            }
        }
    }
}
