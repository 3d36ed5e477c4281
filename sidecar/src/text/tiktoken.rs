//! Tokenizers of tiktoken: lines of a token's base64 and its rank, which is its id.
//!
//! The file tells neither how texts are taken apart before tokens are looked for nor the special
//! tokens. The first follows from the tokenizer's family, the second from `tokenizer_config.json`.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::convert::{Config, ConvertError, put_around};
use super::merges::merges;
use super::named::{Named, Token};

/// Llama 3.
const LLAMA: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same, and spaces at a text's end are one piece with the line feeds among them.
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Ids after its ranks that Kimi's tokenizer has for special tokens.
const KIMI_SPECIALS: u32 = 256;
/// Ids after the ranks that special tokens may have.
const MAX_SPECIALS: u32 = 65_536;

/// Tokenizers that take texts apart in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Cl100k,
    O200k,
    Qwen,
    Kimi,
}

impl Family {
    /// The family of a tokenizer, from its class, its model's type, and the name of its file.
    pub(super) fn new(named: &Named, config: &Config, file: &str) -> Result<Self, ConvertError> {
        let class = named.tokenizer_class.as_deref().unwrap_or_default();
        let model_type = config.model_type.as_deref().unwrap_or_default();
        Ok(match (class, model_type) {
            ("QWenTokenizer", _) => Self::Qwen,
            ("TikTokenTokenizer", _) => Self::Kimi,
            (_, "qwen") => Self::Qwen,
            (_, kimi) if kimi.starts_with("kimi") => Self::Kimi,
            (_, "llama" | "mllama") => Self::Llama,
            (_, "gpt_oss") => Self::O200k,
            _ if file.starts_with("cl100k") => Self::Cl100k,
            _ if file.starts_with("o200k") => Self::O200k,
            _ => {
                return Err(ConvertError::Family {
                    class: class.to_owned(),
                    model_type: model_type.to_owned(),
                });
            }
        })
    }

    fn pattern(self) -> &'static str {
        match self {
            Self::Llama => LLAMA,
            Self::Cl100k => CL100K,
            Self::O200k => O200K,
            Self::Qwen => QWEN,
            Self::Kimi => KIMI,
        }
    }

    /// Special tokens that follow so many ranks, before those that `named` gives other names.
    fn specials(
        self,
        ranks: u32,
        named: &Named,
    ) -> Result<BTreeMap<u32, AddedToken>, ConvertError> {
        let given = &named.added_tokens_decoder;
        let ids = ranks..;
        let names: Vec<String> = if self == Self::Qwen {
            let known = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
            let extras = (0..205).map(|i| format!("<|extra_{i}|>"));
            known.into_iter().chain(extras).collect()
        } else {
            let last = given.keys().next_back();
            let last = last.ok_or(ConvertError::Lacks("added_tokens_decoder"))?;
            if *last >= ranks.saturating_add(MAX_SPECIALS) {
                return Err(ConvertError::Far(*last));
            }
            let least = if self == Self::Kimi { KIMI_SPECIALS } else { 0 };
            let end = last.saturating_add(1).max(ranks.saturating_add(least));
            let reserved = |id| format!("<|reserved_token_{id}|>");
            (ranks..end).map(reserved).collect()
        };
        let special = |name: String| AddedToken::from(name, true);
        let all = ids.zip(names.into_iter().map(special));
        Ok(all.filter(|(id, _)| !given.contains_key(id)).collect())
    }
}

/// The tokenizer of a file.
///
/// # Errors
/// When it is no such file, or its special tokens are not known.
pub(super) fn tokenizer(
    bytes: &[u8],
    family: Family,
    named: &Named,
) -> Result<Tokenizer, ConvertError> {
    let mut vocabulary = vocabulary(bytes)?;
    let ranks: HashMap<&str, u32> = vocabulary.iter().map(|(t, r)| (&t[..], *r)).collect();
    let merges = merges(&ranks);
    let count = u32::try_from(vocabulary.len()).unwrap_or(u32::MAX);
    let added = named.added(family.specials(count, named)?, &mut vocabulary)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), merges)
        // A piece that is a token is that token, whether merges come to it or not.
        .ignore_merges(true)
        .build()?;
    let mut tokenizer = Tokenizer::new(model);
    let pattern = SplitPattern::Regex(family.pattern().to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, true, false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    if family == Family::Qwen {
        tokenizer.with_normalizer(Some(NFC))?;
    }
    tokenizer.add_tokens(added)?;
    // The classes of the other families put nothing around texts, whatever the settings say.
    if !matches!(family, Family::Qwen | Family::Kimi) {
        let before = named
            .bos_token
            .as_ref()
            .filter(|_| named.add_bos_token == Some(true));
        let after = named
            .eos_token
            .as_ref()
            .filter(|_| named.add_eos_token == Some(true));
        put_around(
            &mut tokenizer,
            before.map(Token::text),
            after.map(Token::text),
        )?;
    }
    Ok(tokenizer)
}

/// The tokens of a file, their bytes written as `ByteLevel` writes them.
fn vocabulary(bytes: &[u8]) -> Result<HashMap<String, u32>, ConvertError> {
    let chars = byte_chars();
    let mut vocabulary = HashMap::new();
    for (n, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let (token, rank) = token(line).ok_or(ConvertError::Line(n + 1))?;
        let token = token.iter().map(|byte| chars[usize::from(*byte)]);
        let token: String = token.collect();
        if vocabulary.contains_key(&token) {
            return Err(ConvertError::Twice(token));
        }
        vocabulary.insert(token, rank);
    }
    let mut ranks: Vec<u32> = vocabulary.values().copied().collect();
    ranks.sort_unstable();
    if let Some((_, rank)) = (0..).zip(ranks).find(|(n, rank)| n != rank) {
        return Err(ConvertError::Rank(rank));
    }
    let lacks = |(_, c): &(u8, char)| !vocabulary.contains_key(c.encode_utf8(&mut [0; 4]) as &str);
    match (0..=u8::MAX).zip(chars).find(lacks) {
        Some((byte, _)) => Err(ConvertError::Byte(byte)),
        None => Ok(vocabulary),
    }
}

/// Token and rank of a line.
fn token(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let (token, rank) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let token = STANDARD.decode(token).ok()?;
    let rank = rank.trim_start().parse().ok()?;
    (!token.is_empty()).then_some((token, rank))
}

/// How GPT-2 writes bytes: those that Latin-1 prints as they are, the others from U+0100 on.
fn byte_chars() -> [char; 256] {
    let mut other = '\u{100}'..;
    let mut chars = ['\0'; 256];
    for (c, byte) in chars.iter_mut().zip(0..=u8::MAX) {
        *c = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => other.next().unwrap_or_default(),
        };
    }
    chars
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::encoder::Encoder;
    use super::*;

    const FAMILIES: [(&str, Family); 5] = [
        ("Llama", Family::Llama),
        ("Cl100k", Family::Cl100k),
        ("O200k", Family::O200k),
        ("Qwen", Family::Qwen),
        ("Kimi", Family::Kimi),
    ];

    fn fixture(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/tiktoken");
        std::fs::read(folder.join(name)).expect("a file")
    }

    fn named() -> Named {
        serde_json::from_slice(&fixture("tokenizer_config.json")).expect("settings")
    }

    #[test]
    fn texts_have_the_ids_of_tiktoken() {
        type Golden = HashMap<String, Vec<(String, Vec<u32>)>>;
        let golden: Golden = serde_json::from_slice(&fixture("golden.json")).expect("ids");
        let file = fixture("tiktoken.model");
        for (name, family) in FAMILIES {
            let tokenizer = tokenizer(&file, family, &named()).expect("a tokenizer");
            let encoder = Encoder::new(tokenizer).expect("an encoder");
            assert!(encoder.cuts().any(), "{name}");
            assert!(!golden[name].is_empty());
            for (text, ids) in &golden[name] {
                let found = encoder.whole(text).expect("ids");
                assert_eq!(found, *ids, "{name} {text:?}");
            }
        }
    }

    #[test]
    fn special_tokens_follow_the_ranks() {
        let file = fixture("tiktoken.model");
        let id = |family, named: &Named, token| {
            let tokenizer = tokenizer(&file, family, named).expect("a tokenizer");
            tokenizer.token_to_id(token)
        };
        let bare = Named::default();
        assert_eq!(id(Family::Qwen, &bare, "<|im_end|>"), Some(604));
        assert_eq!(id(Family::Qwen, &bare, "<|extra_204|>"), Some(809));
        let last = "<|reserved_token_857|>";
        assert_eq!(id(Family::Kimi, &named(), last), Some(857));
        assert_eq!(id(Family::O200k, &named(), last), None);
        let without = tokenizer(&file, Family::Llama, &bare).err();
        let lacks = matches!(without, Some(ConvertError::Lacks("added_tokens_decoder")));
        assert!(lacks, "{without:?}");
    }

    #[test]
    fn texts_begin_as_the_settings_say() {
        let file = fixture("tiktoken.model");
        let json = r#"{"add_bos_token": true, "bos_token": "<|im_start|>"}"#;
        let mut settings: Named = serde_json::from_str(json).expect("settings");
        settings.added_tokens_decoder = named().added_tokens_decoder;
        for (family, begins) in [(Family::Llama, &[603_u32][..]), (Family::Kimi, &[][..])] {
            let tokenizer = tokenizer(&file, family, &settings).expect("a tokenizer");
            let encoder = Encoder::new(tokenizer).expect("an encoder");
            assert_eq!(encoder.around(), (begins, &[][..]));
        }
    }

    #[test]
    fn families_are_told_by_class_type_or_file() {
        let family = |class: Option<&str>, model_type: Option<&str>, file| {
            let mut named = Named::default();
            named.tokenizer_class = class.map(str::to_owned);
            let model_type = model_type.map(str::to_owned);
            Family::new(&named, &Config { model_type }, file)
        };
        let is = |found: Result<Family, _>, family| assert_eq!(found.ok(), Some(family));
        is(family(Some("QWenTokenizer"), None, "qwen"), Family::Qwen);
        is(
            family(Some("TikTokenTokenizer"), Some("deepseek_v3"), "tiktoken"),
            Family::Kimi,
        );
        is(family(None, Some("kimi_k2"), "tiktoken"), Family::Kimi);
        is(family(None, Some("llama"), "tokenizer"), Family::Llama);
        is(family(None, None, "o200k_base"), Family::O200k);
        is(family(None, None, "cl100k_base"), Family::Cl100k);
        let unknown = family(Some("ChatGLM4Tokenizer"), Some("chatglm"), "tokenizer");
        let unknown = unknown.expect_err("no family").to_string();
        assert!(unknown.contains("\"ChatGLM4Tokenizer\""), "{unknown}");
    }

    #[test]
    fn broken_files_are_refused() {
        let file = fixture("tiktoken.model");
        let with = |line: &str| [&file[..], line.as_bytes()].concat();
        let refused = |bytes: &[u8]| {
            let tokenizer = tokenizer(bytes, Family::Qwen, &Named::default());
            tokenizer.expect_err("an error").to_string()
        };
        assert!(refused(&with("!!! 602\n")).starts_with("line 603 "));
        assert!(refused(&with("YWJj\n")).starts_with("line 603 "));
        assert!(refused(&with("YWJjZGVm 603\n")).starts_with("rank 603 "));
        assert!(refused(&with("IQ== 602\n")).starts_with("token \"!\" "));
        assert!(refused(b"IQ== 0\n").starts_with("no token for byte 0x00"));
        let named: Named = serde_json::from_str(r#"{"bos_token": "<s>"}"#).expect("settings");
        let error = tokenizer(&file, Family::Qwen, &named).expect_err("an error");
        assert_eq!(error.to_string(), "special token \"<s>\" has no id");
    }
}
