//! A model whose files are made on the spot.

use std::path::{Path, PathBuf};

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}\
    {% for m in messages %}{% if m.role == 'forbidden' %}{{ raise_exception('no') }}{% endif %}\
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Stands for an image in what a template writes.
pub(crate) const PLACEHOLDER: &str = "<|image_pad|>";
const SEEING: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
    {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
    {% if part.type == 'image' %}{{ '<|image_pad|>' }}{% else %}{{ part.text }}{% endif %}\
    {% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}";

/// Words that texts are made of.
pub(crate) const WORDS: [&str; 24] = [
    "the",
    "router",
    "sends",
    "a",
    "request",
    "to",
    "one",
    "worker",
    "that",
    "holds",
    "its",
    "prefix",
    "def",
    "f(x):",
    "caf\u{e9}",
    "\u{4f60}\u{597d}",
    "\u{1f600}",
    "<|im_end|>",
    "12345",
    "block",
    "of",
    "sixteen",
    "tokens",
    "and",
];

/// A model's folder, its tokenizer trained on the spot.
pub(crate) fn model(dir: &Path) -> PathBuf {
    let folder = dir.join("model");
    std::fs::create_dir(&folder).expect("a writable directory");
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    let trainer = BpeTrainer::builder().vocab_size(500).show_progress(false);
    let mut trainer = TrainerWrapper::BpeTrainer(trainer.build());
    tokenizer
        .train(&mut trainer, WORDS.iter())
        .expect("a trained tokenizer");
    let special =
        ["<|im_start|>", "<|im_end|>", PLACEHOLDER].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).expect("tokens");
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .expect("a writable directory");
    std::fs::write(folder.join("chat_template.jinja"), TEMPLATE).expect("a writable directory");
    folder
}

/// A model's folder with a tokenizer of tiktoken, of Llama 3's family.
pub(crate) fn tiktoken(dir: &Path) -> PathBuf {
    let folder = dir.join("model");
    std::fs::create_dir(&folder).expect("a writable directory");
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let from = tests.join("../sidecar/tests/fixtures/text/tiktoken");
    for name in ["tiktoken.model", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), folder.join(name)).expect("a fixture");
    }
    let config = folder.join("config.json");
    std::fs::write(config, r#"{"model_type": "llama"}"#).expect("a writable directory");
    std::fs::write(folder.join("chat_template.jinja"), TEMPLATE).expect("a writable directory");
    folder
}

/// A model as [`model`] makes it, of Qwen2-VL's family, with the id of its placeholder.
pub(crate) fn seeing(dir: &Path) -> (PathBuf, u32) {
    let folder = model(dir);
    std::fs::write(folder.join("chat_template.jinja"), SEEING).expect("a writable directory");
    let processor = r#"{"image_processor_type": "Qwen2VLImageProcessor"}"#;
    let file = folder.join("preprocessor_config.json");
    std::fs::write(file, processor).expect("a writable directory");
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).expect("a tokenizer");
    let placeholder = tokenizer.token_to_id(PLACEHOLDER).expect("a token");
    (folder, placeholder)
}
