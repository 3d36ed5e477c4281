//! The head record: the small value a filter reads first for every decision.

/// What the pages and the worker table in shared data amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Publisher's epoch; pages and table of another epoch are not used.
    pub epoch: u32,
    /// Page ids are the low `level` bits of a unit's key, or one bit more during growth.
    pub level: u8,
    /// Blocks to a group.
    pub group: u8,
    /// Whether a full set of pages has been written.
    pub ready: bool,
    /// Version of the worker table; a reader decodes the table again when it changes.
    pub table_version: u64,
    /// Grows with every write of the head, at least once a second while the sidecar lives.
    pub beat: u64,
}

impl Head {
    /// Encoded size in bytes.
    pub const SIZE: usize = 24;

    /// Little-endian fields: level, group, ready, reserved byte, epoch, table version, beat.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let [e0, e1, e2, e3] = self.epoch.to_le_bytes();
        let [t0, t1, t2, t3, t4, t5, t6, t7] = self.table_version.to_le_bytes();
        let [b0, b1, b2, b3, b4, b5, b6, b7] = self.beat.to_le_bytes();
        [
            self.level,
            self.group,
            u8::from(self.ready),
            0,
            e0,
            e1,
            e2,
            e3,
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            b0,
            b1,
            b2,
            b3,
            b4,
            b5,
            b6,
            b7,
        ]
    }

    /// The inverse of [`Head::encode`]; `None` unless the length is right.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::SIZE] = bytes.try_into().ok()?;
        let [level, group, ready, _, rest @ ..] = bytes;
        let (epoch, rest) = rest.split_first_chunk()?;
        let (table_version, rest) = rest.split_first_chunk()?;
        let (beat, _) = rest.split_first_chunk()?;
        Some(Self {
            epoch: u32::from_le_bytes(*epoch),
            level: *level,
            group: *group,
            ready: *ready != 0,
            table_version: u64::from_le_bytes(*table_version),
            beat: u64::from_le_bytes(*beat),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Head;

    #[test]
    fn a_head_survives_encoding() {
        let head = Head {
            epoch: 0xdead_beef,
            level: 12,
            group: 32,
            ready: true,
            table_version: u64::MAX - 1,
            beat: 77,
        };
        assert_eq!(Head::decode(&head.encode()), Some(head));
        assert_eq!(Head::decode(&head.encode()[..23]), None);
    }
}
