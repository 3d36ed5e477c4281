//! Tokenizers of SentencePiece: `tokenizer.model`.
//!
//! The file tells how a text is normalized and taken apart, but engines go by the tokenizer's
//! class, which keeps to some of it only. So a model is converted where class and file agree.

mod proto;

use std::collections::{BTreeMap, HashMap};

use prost::Message;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{AddedToken, Tokenizer};

use super::convert::{ConvertError, put_around};
use super::merges::merges;
use super::named::{Named, Token};
use proto::{Algorithm, Kind, Model, Piece};

/// How a space is written in pieces.
const SPACE: char = '\u{2581}';

/// The tokenizer of a file.
///
/// # Errors
/// When it is no such file, or might be converted otherwise than an engine does.
pub(super) fn tokenizer(bytes: &[u8], named: &Named) -> Result<Tokenizer, ConvertError> {
    let model = Model::decode(bytes)?;
    match named.tokenizer_class.as_deref() {
        Some("LlamaTokenizer" | "LlamaTokenizerFast") => llama(&model, named),
        Some("T5Tokenizer" | "T5TokenizerFast") => t5(&model, named),
        class => Err(ConvertError::Family {
            class: class.unwrap_or_default().to_owned(),
            model_type: String::new(),
        }),
    }
}

/// Byte pairs over bytes, with no normalizer.
fn llama(model: &Model, named: &Named) -> Result<Tokenizer, ConvertError> {
    let refused = refused("LlamaTokenizer");
    let normalizer = model.normalizer.clone().unwrap_or_default();
    model.check(Algorithm::Bpe, true, &refused)?;
    if !normalizer.charsmap().is_empty() {
        return Err(refused("a precompiled_charsmap".into()));
    }
    if normalizer.remove_extra_whitespaces() {
        return Err(refused("remove_extra_whitespaces".into()));
    }
    let prefix = named.add_prefix_space.unwrap_or(true);
    if prefix != normalizer.add_dummy_prefix() {
        return Err(refused(format!(
            "add_prefix_space {prefix} and add_dummy_prefix {}",
            !prefix
        )));
    }
    // Defaults of these two differ between versions.
    let legacy = named.legacy.ok_or(ConvertError::Lacks("legacy"))?;
    let begins = named.add_bos_token;
    let begins = begins.ok_or(ConvertError::Lacks("add_bos_token"))?;

    let pairs = model.pairs(&refused)?;
    let mut vocabulary = model.vocabulary()?;
    for byte in 0..=u8::MAX {
        if !vocabulary.contains_key(&format!("<0x{byte:02X}>")) {
            return Err(ConvertError::Byte(byte));
        }
    }
    let added = named.added(model.added(), &mut vocabulary)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), pairs)
        .fuse_unk(true)
        .byte_fallback(true)
        .build()?;
    let mut tokenizer = Tokenizer::new(bpe);
    let scheme = match (prefix, legacy) {
        (false, _) => PrependScheme::Never,
        (true, false) => PrependScheme::First,
        (true, true) => PrependScheme::Always,
    };
    tokenizer.with_pre_tokenizer(Some(Metaspace::new(SPACE, scheme, false)));
    tokenizer.add_tokens(added)?;
    let bos = named.bos_token.as_ref().map_or("<s>", Token::text);
    let eos = named.eos_token.as_ref().map_or("</s>", Token::text);
    let ends = named.add_eos_token.unwrap_or(false);
    put_around(&mut tokenizer, begins.then_some(bos), ends.then_some(eos))?;
    Ok(tokenizer)
}

/// Unigrams of words, whose normalizer leaves spaces alone between them.
fn t5(model: &Model, named: &Named) -> Result<Tokenizer, ConvertError> {
    let refused = refused("T5Tokenizer");
    let normalizer = model.normalizer.clone().unwrap_or_default();
    model.check(Algorithm::Unigram, false, &refused)?;
    if !normalizer.remove_extra_whitespaces() || !normalizer.add_dummy_prefix() {
        return Err(refused("spaces kept as they are".into()));
    }
    // Not even line feeds would be spaces without, but the class takes them for such.
    if normalizer.charsmap().is_empty() {
        return Err(refused("no precompiled_charsmap".into()));
    }
    let unknown = |piece: &Piece| piece.kind() == Kind::Unknown;
    let unknown = model.pieces.iter().position(unknown);
    if unknown != Some(2) {
        return Err(refused("an unknown piece whose id is not 2".into()));
    }
    let across = |piece: &&Piece| piece.piece().chars().skip(1).any(|c| c == SPACE);
    if let Some(piece) = model.pieces.iter().find(across) {
        return Err(refused(format!("piece {:?} of words", piece.piece())));
    }
    let mut vocabulary = model.vocabulary()?;
    let added = named.added(model.added(), &mut vocabulary)?;
    let mut scores: Vec<(String, f64)> = Vec::new();
    for piece in &model.pieces {
        scores.push((piece.piece().to_owned(), f64::from(piece.score())));
    }
    let ids = vocabulary.into_iter().map(|(token, id)| (id, token));
    let ids: BTreeMap<u32, String> = ids.collect();
    for (id, token) in ids.into_iter().skip(scores.len()) {
        if usize::try_from(id) != Ok(scores.len()) {
            return Err(ConvertError::Far(id));
        }
        scores.push((token, 0.0));
    }
    let mut tokenizer = Tokenizer::new(Unigram::from(scores, unknown, false)?);
    let charsmap = Precompiled::from(normalizer.charsmap());
    let charsmap = charsmap.map_err(|error| refused(error.to_string()))?;
    tokenizer.with_normalizer(Some(charsmap))?;
    let metaspace = Metaspace::new(SPACE, PrependScheme::Always, true);
    let parts = vec![WhitespaceSplit.into(), metaspace.into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
    tokenizer.add_tokens(added)?;
    let eos = named.eos_token.as_ref().map_or("</s>", Token::text);
    put_around(&mut tokenizer, None, Some(eos))?;
    Ok(tokenizer)
}

fn refused(class: &'static str) -> impl Fn(String) -> ConvertError {
    move |what| ConvertError::Unsupported { class, what }
}

impl Model {
    /// Whether the model is of an algorithm, over bytes or not, and has nothing that no class of
    /// tokenizers keeps to.
    fn check(
        &self,
        algorithm: Algorithm,
        bytes: bool,
        refused: &impl Fn(String) -> ConvertError,
    ) -> Result<(), ConvertError> {
        let trainer = self.trainer.clone().unwrap_or_default();
        let normalizer = self.normalizer.clone().unwrap_or_default();
        if trainer.algorithm() != algorithm {
            return Err(refused(format!("model_type {:?}", trainer.algorithm())));
        }
        if trainer.byte_fallback() != bytes {
            return Err(refused(format!("byte_fallback {}", !bytes)));
        }
        if trainer.treat_whitespace_as_suffix() {
            return Err(refused("treat_whitespace_as_suffix".into()));
        }
        if !normalizer.escape_whitespaces() {
            return Err(refused("escape_whitespaces false".into()));
        }
        let is_odd = |piece: &&Piece| match piece.kind() {
            Kind::Unused => true,
            // Only the class for bytes finds these before anything else, in the text as it is.
            Kind::UserDefined => !bytes || piece.piece().contains(SPACE),
            Kind::Byte => !bytes,
            Kind::Normal | Kind::Unknown | Kind::Control => false,
        };
        match self.pieces.iter().find(is_odd) {
            Some(piece) => {
                let what = format!("{:?} piece {:?}", piece.kind(), piece.piece());
                Err(refused(what))
            }
            None => Ok(()),
        }
    }

    /// The pairs of its byte pair encoding, best first. No two pieces have the same score, except
    /// runs of spaces with the worst of all: the leftmost grows until there is no longer one.
    fn pairs(
        &self,
        refused: &impl Fn(String) -> ConvertError,
    ) -> Result<Vec<(String, String)>, ConvertError> {
        let normal = || self.pieces.iter().filter(|p| p.kind() == Kind::Normal);
        let worst = normal().map(Piece::score).fold(f32::INFINITY, f32::min);
        let is_run =
            |piece: &&Piece| piece.score() <= worst && piece.piece().chars().all(|c| c == SPACE);
        let mut runs: Vec<&str> = normal().filter(is_run).map(Piece::piece).collect();
        runs.sort_unstable_by_key(|run| run.len());
        if !runs
            .iter()
            .zip(1..)
            .all(|(run, n)| run.chars().count() == n)
        {
            return Err(refused("runs of spaces of the same score with gaps".into()));
        }
        let mut ranks = HashMap::new();
        let mut last = f32::INFINITY;
        for (piece, rank) in normal().filter(|piece| !is_run(piece)).zip(0..) {
            let is_last = !runs.is_empty() && piece.score() <= worst;
            if piece.score() >= last || is_last {
                let same = format!("{:?} not scored below what is before it", piece.piece());
                return Err(refused(same));
            }
            last = piece.score();
            ranks.insert(piece.piece(), rank);
        }
        let mut pairs = merges(&ranks);
        let grown = runs.windows(2).rev();
        let space = || SPACE.to_string();
        pairs.extend(grown.filter_map(|w| Some((w.first()?.to_string(), space()))));
        Ok(pairs)
    }

    fn vocabulary(&self) -> Result<HashMap<String, u32>, ConvertError> {
        let mut all = HashMap::new();
        for (piece, id) in self.pieces.iter().zip(0..) {
            let token = piece.piece().to_owned();
            if all.insert(token, id).is_some() {
                return Err(ConvertError::Twice(piece.piece().to_owned()));
            }
        }
        Ok(all)
    }

    /// Pieces that are found in texts as they are.
    fn added(&self) -> BTreeMap<u32, AddedToken> {
        let pieces = self.pieces.iter().zip(0..);
        let added = pieces.filter_map(|(piece, id)| {
            let is_special = match piece.kind() {
                Kind::Unknown | Kind::Control => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            let token = AddedToken::from(piece.piece(), is_special).normalized(false);
            Some((id, token))
        });
        added.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::super::encoder::Encoder;
    use super::proto::{Normalizer, Trainer};
    use super::*;

    /// Texts, their ids in `transformers` and in SentencePiece, which knows no special tokens.
    #[derive(Deserialize)]
    struct Golden {
        settings: Value,
        texts: Vec<(String, Vec<u32>, Vec<u32>)>,
        #[serde(rename = "one two")]
        one_two: Vec<u32>,
    }

    fn fixture(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text");
        std::fs::read(folder.join(name)).expect("a file")
    }

    fn golden(name: &str) -> Golden {
        serde_json::from_slice(&fixture(name)).expect("ids")
    }

    fn with(model: &[u8], settings: &Value) -> Result<Tokenizer, ConvertError> {
        let named = Named::deserialize(settings).expect("settings");
        tokenizer(model, &named)
    }

    fn has_ids_of_python(model: &str, ids: &str) {
        let golden = golden(ids);
        let tokenizer = with(&fixture(model), &golden.settings).expect("a tokenizer");
        let encoder = Encoder::new(tokenizer).expect("an encoder");
        let mut same = 0;
        for (text, there, sentencepiece) in &golden.texts {
            assert_eq!(encoder.whole(text).expect("ids"), *there, "{text:?}");
            same += usize::from(there == sentencepiece);
        }
        assert!(same >= 11, "{same}");
        let (before, after) = encoder.around();
        let bare = encoder.whole("one two").expect("ids");
        assert_eq!([before, &bare, after].concat(), golden.one_two);
    }

    #[test]
    fn byte_pairs_have_the_ids_of_python() {
        has_ids_of_python("bpe/tokenizer.model", "bpe/golden.json");
        has_ids_of_python("bpe/tokenizer.model", "bpe/legacy.json");
    }

    #[test]
    fn unigrams_have_the_ids_of_python() {
        has_ids_of_python("unigram/tokenizer.model", "unigram/golden.json");
    }

    fn changed(file: &str, change: impl FnOnce(&mut Model)) -> Vec<u8> {
        let mut model = Model::decode(&fixture(file)[..]).expect("a model");
        change(&mut model);
        model.encode_to_vec()
    }

    #[test]
    fn runs_of_spaces_grow_after_everything_else() {
        // As in Llama's: all runs have the same score, the worst.
        let runs = changed("bpe/tokenizer.model", |model| {
            model.pieces[442].piece = Some("\u{2581}\u{2581}\u{2581}".into());
            for piece in &mut model.pieces {
                if piece.piece().chars().all(|c| c == SPACE) {
                    piece.score = Some(-1e9);
                }
            }
        });
        let tokenizer = with(&runs, &golden("bpe/golden.json").settings).expect("a tokenizer");
        let encoder = Encoder::new(tokenizer).expect("an encoder");
        let ids = encoder.whole("the  the        x").expect("ids");
        // SentencePiece's own.
        assert_eq!(ids, [303, 443, 303, 442, 442, 298, 474]);
    }

    #[test]
    fn what_converts_to_nothing_is_refused() {
        type Change = fn(&mut Model);
        let llama = golden("bpe/golden.json").settings;
        let t5 = golden("unigram/golden.json").settings;
        let refused = |file: &str, settings: &Value, change: Change, what: &str| {
            let error = with(&changed(file, change), settings).err();
            let error = error.expect("an error").to_string();
            assert!(error.contains(what), "{error}");
        };
        fn normalizer(model: &mut Model) -> &mut Normalizer {
            model.normalizer.as_mut().expect("a normalizer")
        }
        fn trainer(model: &mut Model) -> &mut Trainer {
            model.trainer.as_mut().expect("a trainer")
        }
        let bpe: [(Change, &str); 9] = [
            (
                |m| normalizer(m).charsmap = Some(vec![1]),
                "precompiled_charsmap",
            ),
            (
                |m| normalizer(m).remove_extra_whitespaces = None,
                "remove_extra_whitespaces",
            ),
            (
                |m| normalizer(m).add_dummy_prefix = Some(false),
                "add_dummy_prefix false",
            ),
            (
                |m| normalizer(m).escape_whitespaces = Some(false),
                "escape_whitespaces",
            ),
            (
                |m| trainer(m).treat_whitespace_as_suffix = Some(true),
                "as_suffix",
            ),
            (|m| trainer(m).byte_fallback = None, "byte_fallback false"),
            (
                |m| trainer(m).algorithm = Some(Algorithm::Word as i32),
                "model_type Word",
            ),
            (
                |m| m.pieces[300].score = m.pieces[299].score,
                "not scored below",
            ),
            (
                |m| m.pieces[300].kind = Some(Kind::Unused as i32),
                "Unused piece",
            ),
        ];
        for (change, what) in bpe {
            refused("bpe/tokenizer.model", &llama, change, what);
        }
        let unigram: [(Change, &str); 4] = [
            (
                |m| m.pieces[300].kind = Some(Kind::UserDefined as i32),
                "UserDefined piece",
            ),
            (|m| normalizer(m).charsmap = None, "no precompiled_charsmap"),
            (
                |m| trainer(m).byte_fallback = Some(true),
                "byte_fallback true",
            ),
            (
                |m| m.pieces[300].piece = Some("\u{2581}a\u{2581}b".into()),
                "of words",
            ),
        ];
        for (change, what) in unigram {
            refused("unigram/tokenizer.model", &t5, change, what);
        }
        refused(
            "unigram/tokenizer.model",
            &llama,
            |_| (),
            "model_type Unigram",
        );
    }

    #[test]
    fn settings_that_are_not_told_are_asked_for() {
        let model = fixture("bpe/tokenizer.model");
        for (lacking, what) in [
            ("legacy", "lacks legacy"),
            ("add_bos_token", "lacks add_bos"),
        ] {
            let mut settings = golden("bpe/golden.json").settings;
            settings[lacking] = Value::Null;
            let error = with(&model, &settings).expect_err("an error");
            assert!(error.to_string().contains(what), "{error}");
        }
        let class = json!({"tokenizer_class": "XLMRobertaTokenizer"});
        let error = with(&model, &class).expect_err("an error");
        assert!(matches!(error, ConvertError::Family { .. }), "{error}");
        let error = with(b"\n\xff", &class).expect_err("an error");
        assert!(matches!(error, ConvertError::Proto(_)), "{error}");
    }
}
