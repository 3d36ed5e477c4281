//! From the tree to page images.

use std::sync::Arc;

use super::run::RunId;
use super::sets::EMPTY;
use super::tree::Tree;
use super::unit::UnitId;
use crate::index::PageWrite;
use crate::page::encode::{Run, SPLIT_BYTES, Source, Unit, encode, set_bytes};
use crate::page::image::Image;
use crate::page::{WHOLE, fingerprint};

/// Pages of one flush, which bounds the time it takes.
const FLUSH_PAGES: usize = 512;
/// Growth steps of one flush.
const FLUSH_GROWTH: usize = 64;

/// The next pages to write.
pub(super) fn flush(tree: &mut Tree, epoch: u32) -> Vec<PageWrite> {
    tree.units.clock = tree.units.clock.wrapping_add(1);
    while let Some((unit, is_loss)) = tree.units.next_change() {
        refresh(tree, unit, is_loss);
    }
    for _ in 0..FLUSH_GROWTH {
        if !tree.units.directory.wants_growth() {
            break;
        }
        tree.units.grow();
    }
    let pages = tree.units.directory.take_dirty(FLUSH_PAGES);
    let write = |id| PageWrite {
        id,
        bytes: encoded(tree, id, epoch),
    };
    pages.into_iter().map(write).collect()
}

/// The image of one page as of the last flush.
pub(super) fn page(tree: &mut Tree, id: u32, epoch: u32) -> Arc<[u8]> {
    let image = tree.units.directory.shared_image(id);
    image.unwrap_or_else(|| encoded(tree, id, epoch))
}

fn encoded(tree: &mut Tree, id: u32, epoch: u32) -> Arc<[u8]> {
    let level = tree.units.directory.level_of(id);
    let mut ids = tree.units.directory.units(id).to_vec();
    let before = Image::new(tree.units.directory.image(id));
    let image = |ids: &[UnitId]| {
        let units: Vec<Source<'_>> = ids.iter().map(|id| source(tree, *id, before)).collect();
        encode(&units, before, level, epoch, |set| tree.eff.members(set))
    };
    let (mut bytes, mut left_out) = image(&ids);
    if left_out > 0 {
        ids.sort_by_key(|id| std::cmp::Reverse(tree.units.at(*id).touched));
        (bytes, left_out) = image(&ids);
    }
    for unit in ids {
        tree.units.at_mut(unit).encoded = true;
    }
    let image: Arc<[u8]> = bytes.into();
    let kept = Arc::clone(&image);
    tree.units.directory.keep(id, kept, left_out);
    image
}

/// A unit that has not changed since its page was encoded comes from there: it is much cheaper
/// than the walk through its runs.
fn source<'a>(tree: &Tree, id: UnitId, before: Image<'a>) -> Source<'a> {
    let unit = tree.units.at(id);
    let kept = unit.encoded.then(|| before.unit(fingerprint(unit.key)));
    match kept.flatten() {
        Some(kept) => Source::Before(kept),
        None => Source::Index(unit_image(tree, id)),
    }
}

/// Brings one changed unit's listing, split and page up to date.
fn refresh(tree: &mut Tree, id: UnitId, is_loss: bool) {
    let unit = *tree.units.at(id);
    if tree.run(unit.root).eff == EMPTY {
        tree.units.unlist(id);
        return;
    }
    tree.units.list(id);
    tree.units.directory.soil(unit.key, unit.depth, is_loss);
    if most_bytes(tree, id) <= SPLIT_BYTES {
        return;
    }
    let image = unit_image(tree, id);
    if let Some(position) = split_position(tree, unit.depth, &image) {
        split(tree, id, position);
    }
}

/// Bytes that a unit takes at most, counted without putting it together.
fn most_bytes(tree: &Tree, id: UnitId) -> usize {
    let mut bytes = 10;
    let mut others = Vec::new();
    let mut at = Some(tree.units.at(id).root);
    while let Some(start) = at {
        let run = tree.run(start);
        bytes += 8 + 2 * run.blocks.len() + set_bytes(tree.eff.members(run.eff));
        others.extend(visible(tree, id, start));
        at = others.pop();
    }
    bytes
}

/// Runs of a unit that begin after one of its runs, as far as somebody is published with them.
fn visible(tree: &Tree, unit: UnitId, run: RunId) -> impl Iterator<Item = RunId> + '_ {
    let is_visible = move |child: &RunId| {
        let child = tree.run(*child);
        child.unit == unit && child.eff != EMPTY
    };
    tree.children(run).filter(is_visible)
}

fn unit_image(tree: &Tree, id: UnitId) -> Unit {
    let unit = tree.units.at(id);
    let mut runs = Vec::new();
    let mut starts = vec![unit.root];
    while let Some(start) = starts.pop() {
        let mut of = tree.run(start);
        let mut run = Run {
            position: of.first,
            set: of.eff,
            blocks: of.blocks.iter().map(|b| b.sequence).collect(),
        };
        let mut at = start;
        loop {
            let first = starts.len();
            starts.extend(visible(tree, id, at));
            match starts.get(first..) {
                // Runs that differ in what is hidden only are one to readers.
                Some(&[only]) if tree.run(only).eff == run.set => {
                    starts.truncate(first);
                    of = tree.run(only);
                    run.blocks.extend(of.blocks.iter().map(|b| b.sequence));
                    at = only;
                }
                _ => break,
            }
        }
        runs.push(run);
    }
    Unit {
        fingerprint: fingerprint(unit.key),
        split: unit.split,
        runs,
    }
}

/// Where a unit that has grown too large splits: the last position whose blocks before it take at
/// most half of what a unit may.
fn split_position(tree: &Tree, depth: u32, image: &Unit) -> Option<u8> {
    let mut sets: Vec<u32> = image.runs.iter().map(|r| r.set).collect();
    sets.sort_unstable();
    sets.dedup();
    let set_size = |set: &u32| set_bytes(tree.eff.members(*set));
    let total = image.bytes() + sets.iter().map(set_size).sum::<usize>();
    if total <= SPLIT_BYTES {
        return None;
    }
    let first = tree.units.position(depth);
    let end = |r: &Run| usize::from(r.position) + r.blocks.len();
    let last = image.runs.iter().map(end).max()?;
    let mut by_position = vec![0_usize; last];
    let mut seen: Vec<u32> = Vec::new();
    let mut runs: Vec<&Run> = image.runs.iter().collect();
    runs.sort_by_key(|r| r.position);
    for run in runs {
        let start = usize::from(run.position);
        let set = if seen.contains(&run.set) {
            0
        } else {
            set_size(&run.set)
        };
        seen.push(run.set);
        for (i, bytes) in by_position
            .iter_mut()
            .enumerate()
            .take(end(run))
            .skip(start)
        {
            *bytes += if i == start { 8 + set } else { 2 };
        }
    }
    let mut sum = 0;
    let fits = |bytes: &&usize| {
        sum += **bytes;
        sum <= SPLIT_BYTES / 2
    };
    let position = by_position.iter().take_while(fits).count();
    let position = u8::try_from(position).ok()?.max(first + 1);
    (usize::from(position) < last).then_some(position)
}

/// Makes every block at `position` of the unit, published or not, a unit of its own.
fn split(tree: &mut Tree, id: UnitId, position: u8) {
    let unit = *tree.units.at(id);
    let mut roots = Vec::new();
    let mut stack = vec![unit.root];
    while let Some(at) = stack.pop() {
        let run = tree.run(at);
        let before = usize::from(position.saturating_sub(run.first));
        if before == 0 {
            roots.push(at);
        } else if before < run.blocks.len() {
            roots.push(tree.split(at, before).1);
        } else {
            let is_inside = |child: &RunId| tree.run(*child).unit == id;
            stack.extend(tree.children(at).filter(is_inside));
        }
    }
    let parent = tree.units.at_mut(id);
    parent.split = position;
    parent.below = u32::try_from(roots.len()).unwrap_or(u32::MAX);
    for root in roots {
        let run = tree.run(root);
        let first = run.blocks.first().map_or(0, |block| block.sequence);
        let (key, depth) = (run.space.key(&tree.secrets, first), run.depth);
        let new = tree.units.begin(root, key, depth);
        let mut below = 0;
        let mut stack = vec![root];
        while let Some(at) = stack.pop() {
            tree.runs.at_mut(at).unit = new;
            for child in tree.children(at) {
                let child_run = tree.run(child);
                if child_run.unit == id {
                    stack.push(child);
                } else if child_run.first != 0 {
                    below += 1;
                }
            }
        }
        let sub = tree.units.at_mut(new);
        sub.below = below;
        sub.split = if below > 0 { unit.split } else { WHOLE };
        tree.units.touch(new, false);
    }
}
