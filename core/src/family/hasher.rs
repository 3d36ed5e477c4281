//! Hashes of a family over tokens that come in pieces.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;
use xxhash_rust::xxh64::Xxh64;

use super::{Namespace, Scheme, cbor};
use crate::hash::Seed;
use crate::id::Family;

/// The hashes of a prompt's complete blocks, as senders of the family name them.
#[derive(Clone)]
pub struct FamilyHasher {
    family: Family,
    block_size: usize,
    state: State,
    /// Tokens from the first block that is not complete on.
    tail: Vec<u32>,
    bytes: Vec<u8>,
    hashes: Vec<u64>,
}

/// What the next block's digest depends on.
#[derive(Clone)]
enum State {
    /// All that came before.
    Prefix(Xxh64),
    /// The digest before it, if there is one.
    Sha256(Option<[u8; 32]>),
    /// The digest before it.
    Blake3([u8; 32]),
    /// Nothing: the index chains them.
    Blocks(Seed),
    /// The digest before it, the LoRA adapter, and before the first block the salt.
    Cbor {
        parent: Vec<u8>,
        lora: String,
        salt: Option<String>,
    },
}

impl FamilyHasher {
    /// A hasher at the start of a prompt; `None` where the family has no hashes for it.
    #[must_use]
    pub fn new(scheme: &Scheme, namespace: Namespace<'_>) -> Option<Self> {
        let mut bytes = Vec::new();
        let family = scheme.family;
        let state = match family {
            Family::FlexKv => {
                let parts = [namespace.lora, namespace.salt].into_iter();
                let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
                let mut prefix = Xxh64::new(0);
                for byte in parts.join("\0").bytes() {
                    prefix.update(&u64::from(byte).to_le_bytes());
                }
                State::Prefix(prefix)
            }
            Family::HiCache if namespace.is_plain() => State::Sha256(None),
            Family::LmCache if namespace.is_plain() => State::Blake3(blake3::hash(&[0; 12]).into()),
            Family::VllmSha256Cbor | Family::VllmXxhashCbor => {
                cbor::text(&scheme.hash_seed, &mut bytes);
                State::Cbor {
                    parent: digest(family, &bytes),
                    lora: namespace.lora.to_owned(),
                    salt: Some(namespace.salt.to_owned()).filter(|salt| !salt.is_empty()),
                }
            }
            Family::Predicted => State::Blocks(Seed::new(namespace.lora, namespace.salt)),
            Family::Dynamo | Family::HiCache | Family::LmCache => return None,
        };
        Some(Self {
            family,
            block_size: usize::try_from(scheme.block_size).ok().filter(|n| *n > 0)?,
            state,
            tail: Vec::new(),
            bytes,
            hashes: Vec::new(),
        })
    }

    /// Takes the next tokens.
    pub fn push(&mut self, tokens: &[u32]) {
        let mut rest = tokens;
        if !self.tail.is_empty() {
            let missing = self.block_size - self.tail.len();
            let Some((head, after)) = rest.split_at_checked(missing) else {
                self.tail.extend_from_slice(rest);
                return;
            };
            rest = after;
            let mut block = std::mem::take(&mut self.tail);
            block.extend_from_slice(head);
            self.block(&block);
        }
        let blocks = rest.chunks_exact(self.block_size);
        self.tail.extend_from_slice(blocks.remainder());
        for block in blocks {
            self.block(block);
        }
    }

    /// The hashes of the complete blocks so far.
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// The hashes, without the hasher.
    #[must_use]
    pub fn into_hashes(self) -> Vec<u64> {
        self.hashes
    }

    fn block(&mut self, tokens: &[u32]) {
        let bytes = &mut self.bytes;
        bytes.clear();
        let hash = match &mut self.state {
            State::Prefix(prefix) => {
                bytes.extend(tokens.iter().flat_map(|t| u64::from(*t).to_le_bytes()));
                prefix.update(bytes);
                prefix.digest()
            }
            State::Sha256(parent) => {
                bytes.extend(parent.iter().flatten());
                bytes.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
                let digest: [u8; 32] = Sha256::digest(&bytes).into();
                *parent = Some(digest);
                self.family.reduce(&digest)
            }
            State::Blake3(parent) => {
                bytes.extend(&*parent);
                bytes.extend(tokens.iter().flat_map(|t| t.to_be_bytes()));
                *parent = blake3::hash(bytes).into();
                self.family.reduce(parent)
            }
            State::Blocks(seed) => seed.block(tokens),
            State::Cbor { parent, lora, salt } => {
                let salt = salt.take();
                let mut extra_keys: Vec<&str> = Vec::new();
                extra_keys.extend(Some(lora.as_str()).filter(|lora| !lora.is_empty()));
                extra_keys.extend(salt.as_deref());
                cbor::block(parent, tokens, &extra_keys, bytes);
                *parent = digest(self.family, bytes);
                self.family.reduce(parent)
            }
        };
        self.hashes.push(hash);
    }
}

fn digest(family: Family, bytes: &[u8]) -> Vec<u8> {
    match family {
        Family::VllmXxhashCbor => xxh3_128(bytes).to_be_bytes().to_vec(),
        _ => Sha256::digest(bytes).to_vec(),
    }
}
