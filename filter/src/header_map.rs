//! All headers of a message, read at once: each call into Envoy costs more than a look at them all.

/// Headers in Envoy's order, names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderMap {
    bytes: Vec<u8>,
}

impl HeaderMap {
    /// Headers as the ABI has them, all numbers four bytes, little-endian: how many there are, the
    /// sizes of each one's name and value, then each name and value with a NUL after it.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// Names and values; those that are cut off are left out.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (count, rest) = number(&self.bytes).unwrap_or_default();
        let sizes = count.checked_mul(8).and_then(|n| rest.split_at_checked(n));
        let (sizes, mut rest) = sizes.unwrap_or_default();
        sizes.as_chunks::<8>().0.iter().map_while(move |size| {
            let (name, size) = number(size)?;
            let (value, _) = number(size)?;
            let name = text(&mut rest, name)?;
            Some((name, text(&mut rest, value)?))
        })
    }

    /// First value of a header.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let mut all = self.iter();
        all.find_map(|(n, value)| (n == name.as_bytes()).then_some(value))
    }
}

/// Headers as the ABI has them.
#[must_use]
pub fn encode<'a>(headers: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let (mut count, mut sizes, mut texts) = (0, Vec::new(), Vec::new());
    for (name, value) in headers {
        count += 1;
        for text in [name, value] {
            sizes.extend(number(text.len()));
            texts.extend(text.bytes().chain([0]));
        }
    }
    [&number(count)[..], &sizes, &texts].concat()
}

fn number(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((usize::try_from(u32::from_le_bytes(*number)).ok()?, rest))
}

/// Takes so many bytes and the NUL after them.
fn text<'a>(rest: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let (text, after) = rest.split_at_checked(size)?;
    *rest = after.get(1..)?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, encode};

    const BYTES: &[u8] = b"\x03\0\0\0\x05\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\
        :path\0/\0a\0\0a\0\xff2\0";

    #[test]
    fn the_first_value_of_a_name_is_found() {
        let map = HeaderMap::new(BYTES.to_vec());
        assert_eq!(map.get(":path"), Some(&b"/"[..]));
        assert_eq!(map.get("a"), Some(&b""[..]));
        assert_eq!(map.get("b"), None);
        assert_eq!(map.iter().last(), Some((&b"a"[..], &b"\xff2"[..])));
    }

    #[test]
    fn what_is_encoded_is_read() {
        let headers = [("content-type", "application/json"), ("retry-after", "1")];
        let map = HeaderMap::new(encode(headers.into_iter()));
        let read: Vec<_> = map.iter().collect();
        let expected = headers.map(|(n, v)| (n.as_bytes(), v.as_bytes()));
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        for end in 0..BYTES.len() {
            let map = HeaderMap::new(BYTES[..end].to_vec());
            assert!(map.iter().count() < 3, "{end}");
        }
        let huge = HeaderMap::new(b"\xff\xff\xff\xff\0\0\0\0".to_vec());
        assert_eq!(huge.iter().count(), 0);
    }
}
