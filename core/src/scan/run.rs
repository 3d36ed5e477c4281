//! The fast path of token ids: numbers with equal separators between them.
//!
//! A separator is one comma and then a fixed number of blanks. The bytes are classified 64 at a
//! time; bit masks tell where numbers begin and end, and prove that the separators are what they
//! should be. Anything else (another separator, more than 8 digits, a leading zero, a bracket, the
//! last bytes of a chunk) is left to the reader that goes byte by byte.

use super::lanes;

const BLOCK: usize = 64;
/// Bytes of a span, whose numbers are converted together.
const SPAN: usize = 7 * BLOCK;
/// Bytes before a span, where its first number may begin.
const LEAD: usize = 8;
/// Every place in a window at which a number may begin, and more.
const PLACES: usize = 512;
/// Bytes of a window: a span, what comes before it, and enough after it to read 8 bytes at any
/// place.
const WINDOW: usize = PLACES + 8;
/// Room for the numbers that can end in a span, and to write past them by eight.
const NUMBERS: usize = SPAN / 2 + 8;

/// Reads numbers from `chunk[from]`, the first digit of one, into `ids`, which may grow to `limit`.
/// Returns the index after the comma that follows the last number read; `from` if there is none.
pub(super) fn read(chunk: &[u8], from: usize, ids: &mut Vec<u32>, limit: usize) -> usize {
    let Some(mut window_at) = from.checked_sub(LEAD) else {
        return from;
    };
    let Some(mut borders) = Borders::new(chunk, from) else {
        return from;
    };
    ids.reserve(((chunk.len() - from) / 6).min(limit.saturating_sub(ids.len())));
    let mut next = from;
    let mut numbers = [0; NUMBERS];
    while ids.len() + NUMBERS <= limit {
        let Some(rest) = chunk.get(window_at..) else {
            break;
        };
        let padded;
        let window = match rest.first_chunk() {
            Some(window) => window,
            None => {
                padded = pad(rest);
                &padded
            }
        };
        let regular = borders.read(window);
        if !convert(window, &borders, &mut numbers) {
            break;
        }
        ids.extend(numbers.iter().take(borders.count));
        if let Some(end) = borders.last_end() {
            next = window_at + LEAD + end + 1;
        }
        if !regular {
            break;
        }
        window_at += SPAN;
    }
    next
}

/// A window at a chunk's end. The bytes after it are part of no number or separator.
fn pad(rest: &[u8]) -> [u8; WINDOW] {
    let mut window = [u8::MAX; WINDOW];
    for (padded, byte) in window.iter_mut().zip(rest) {
        *padded = *byte;
    }
    window
}

/// Where numbers end. Places count from the beginning of the span.
struct Borders {
    /// Bytes of a separator.
    gap: u32,
    /// The last number that ended in the span before, or a place that makes the first number begin
    /// at the span's beginning.
    before: u32,
    /// The ends.
    ends: [u32; NUMBERS],
    /// How many ends there are.
    count: usize,
    /// Bit 0: the byte before is a digit.
    inside: u64,
    /// Bits of the next block at which a number must begin.
    due: u64,
    /// Bit 0: the byte before is a zero that begins a number.
    zero: u64,
}

impl Borders {
    /// For the numbers from `chunk[from]` on, the first digit of one. `None` if there is no second
    /// number near.
    fn new(chunk: &[u8], from: usize) -> Option<Self> {
        let block = chunk.get(from..)?.first_chunk()?;
        let digits = lanes::classify(block).digits;
        let end = (!digits).trailing_zeros();
        let start = (digits & u64::MAX.checked_shl(end)?).trailing_zeros();
        if start == u64::BITS {
            return None;
        }
        let gap = start - end;
        Some(Self {
            gap,
            before: 0u32.wrapping_sub(gap),
            ends: [0; NUMBERS],
            count: 0,
            inside: 0,
            due: 1,
            zero: 0,
        })
    }

    /// Finds the ends of the next span. Returns whether the span is regular; if not, the ends are
    /// those of the regular blocks at its beginning.
    fn read(&mut self, window: &[u8; WINDOW]) -> bool {
        if let Some(end) = self.last_end() {
            self.before = (end as u32).wrapping_sub(SPAN as u32);
        }
        self.count = 0;
        let (_, span) = window.split_at(LEAD);
        let (blocks, _) = span.as_chunks();
        let mut place = 0;
        for block in blocks.iter().take(SPAN / BLOCK) {
            let Some(ends) = self.check(block) else {
                return false;
            };
            self.extract(ends, place);
            place += BLOCK as u32;
        }
        // Where no number ends in a whole span, one has too many digits.
        self.count > 0
    }

    /// Ends of numbers in a block, if it is regular.
    #[inline(always)]
    fn check(&mut self, block: &[u8; BLOCK]) -> Option<u64> {
        let bytes = lanes::classify(block);
        let after_digit = bytes.digits << 1 | self.inside;
        let ends = after_digit & !bytes.digits;
        let starts = bytes.digits & !after_digit;
        let zeros = bytes.zeros & starts;
        let wrong = !(bytes.digits | bytes.commas | bytes.blanks)
            | (bytes.commas ^ ends)
            | (starts ^ (ends << self.gap | self.due))
            | (bytes.digits & (zeros << 1 | self.zero));
        self.inside = bytes.digits >> 63;
        self.due = ends >> (u64::BITS - self.gap);
        self.zero = zeros >> 63;
        (wrong == 0).then_some(ends)
    }

    /// Appends the places of the bits of `ends`, which counts from `place`.
    #[inline(always)]
    fn extract(&mut self, mut ends: u64, place: u32) {
        let mut at = self.count;
        self.count += ends.count_ones() as usize;
        while ends != 0 {
            let rest = self.ends.get_mut(at..).unwrap_or_default();
            let Some(slots) = rest.first_chunk_mut::<8>() else {
                return;
            };
            for slot in slots {
                *slot = place + ends.trailing_zeros();
                ends &= ends.wrapping_sub(1);
            }
            at += 8;
        }
    }

    fn last_end(&self) -> Option<usize> {
        let end = self.ends.get(self.count.checked_sub(1)?)?;
        Some(*end as usize)
    }
}

/// Converts the numbers that end in the span. False if one has more than 8 digits.
fn convert(window: &[u8; WINDOW], borders: &Borders, numbers: &mut [u32; NUMBERS]) -> bool {
    let gap = borders.gap;
    let mut previous = borders.before;
    let mut lengths = 0;
    let mut number = |end: u32| {
        let start = previous.wrapping_add(gap);
        previous = end;
        let length = end.wrapping_sub(start);
        lengths |= length.wrapping_sub(1);
        let at = start.wrapping_add(LEAD as u32) as usize % PLACES;
        let rest = window.get(at..).unwrap_or_default();
        let word = rest
            .first_chunk()
            .map_or(0, |word| u64::from_le_bytes(*word));
        word << (64u32.wrapping_sub(8 * length) % 64)
    };
    let (groups, _) = borders.ends.as_chunks::<4>();
    let (results, _) = numbers.as_chunks_mut::<4>();
    let whole = borders.count / 4;
    for (group, result) in groups.iter().zip(results).take(whole) {
        *result = lanes::decimals(group.map(&mut number));
    }
    if let (Some(group), Some(result)) = (
        groups.get(whole),
        numbers.as_chunks_mut::<4>().0.get_mut(whole),
    ) {
        let mut words = [0; 4];
        for (word, end) in words.iter_mut().zip(group).take(borders.count % 4) {
            *word = number(*end);
        }
        *result = lanes::decimals(words);
    }
    lengths < 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_numbers_are_read_up_to_the_last_block() {
        for blanks in 0..40 {
            for length in 1..9 {
                let numbers: Vec<u32> = (0..700)
                    .map(|n| 12_345_678 % 10u32.pow(length) + n % 3)
                    .collect();
                let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
                let chunk = format!(
                    "\"prompt\":[{}]",
                    texts.join(&format!(",{}", " ".repeat(blanks)))
                );
                let mut ids = Vec::new();
                let next = read(chunk.as_bytes(), 10, &mut ids, 1000);
                assert_eq!(ids, numbers[..ids.len()]);
                assert_eq!(chunk[10..next].matches(',').count(), ids.len());
                assert!(chunk[next..].len() <= 2 * BLOCK, "{blanks} {length} {next}");
            }
        }
    }

    #[test]
    fn ids_never_exceed_the_limit() {
        let chunk = format!("\"prompt\":[{}1]", "1,".repeat(1000));
        for limit in [0, 1, NUMBERS - 1, NUMBERS, NUMBERS + 1, 999] {
            let mut ids = Vec::new();
            read(chunk.as_bytes(), 10, &mut ids, limit);
            assert!(ids.len() <= limit, "{limit}");
            assert_eq!(ids.is_empty(), limit < NUMBERS, "{limit}");
        }
    }

    #[test]
    fn chunks_without_a_run_are_left_alone() {
        let long = format!("{:80}", 1);
        for chunk in [
            "12345678",
            "          1,2,3",
            long.as_str(),
            &"1".repeat(80),
        ] {
            for from in 0..=chunk.len() {
                let mut ids = Vec::new();
                assert_eq!(read(chunk.as_bytes(), from, &mut ids, 1000), from);
                assert!(ids.is_empty());
            }
        }
    }
}
