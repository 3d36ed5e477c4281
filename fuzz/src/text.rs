//! Bodies of requests and streams of answers.

use std::sync::LazyLock;

use kv_core::chunk::Chunks;
use kv_core::handover::Handover;
use kv_core::hash::Seed;
use kv_core::scan::{self, Field, Scan, Scanner};
use kv_core::surface::Surface;
use kv_filter::answer::{Events, Growth};
use kv_filter::usage::Usage;
use kv_router::text::{Model, Prompt};
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Token ids that the scanner keeps.
const MAX_IDS: usize = 1_000;
/// Bytes of a rendered text that are tokenized.
const MAX_TEXT: usize = 600;

/// The input's first byte chooses; the rest is for the target.
fn split(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = bytes.split_first()?;
    Some((usize::from(*first), rest))
}

fn scanned(body: &[u8], surface: Surface, piece: usize) -> Option<Scan> {
    let mut scanner = Scanner::of(MAX_IDS, surface.ids_key());
    for piece in body.chunks(piece.max(1)) {
        scanner.feed(piece);
    }
    scanner.finish().ok()
}

/// Bodies as the filter scans them: alike in pieces of any size, as a full parser reads those that
/// it takes, and still JSON with token ids in them.
pub fn request_body(bytes: &[u8]) {
    let Some((choice, body)) = split(bytes) else {
        return;
    };
    let surface = Surface::ALL[choice % Surface::ALL.len()];
    let whole = scanned(body, surface, body.len());
    assert_eq!(scanned(body, surface, 1 + choice), whole);
    let parsed: Option<serde_json::Map<String, Value>> = serde_json::from_slice(body).ok();
    let Some(parsed) = parsed else { return };
    let scan = whole.expect("what a full parser takes");
    if let Some(Value::String(model)) = parsed.get("model")
        && model.len() <= scan::MAX_STRING
    {
        assert_eq!(scan.model, Field::Value(model.clone()));
    }
    for (key, place) in scan.members.iter() {
        assert!(parsed.contains_key(key));
        let _: Value = serde_json::from_slice(&body[place]).expect("a value");
    }
    for handover in [Handover::Field, Handover::Nvext] {
        if let Some(body) = handover.body(surface, body, &scan.members, b"[1,2]") {
            let changed: Value = serde_json::from_slice(&body).expect("a body");
            let places = ["/prompt", "/input_ids", "/nvext/token_data"];
            let mut places = places.iter().filter_map(|at| changed.pointer(at));
            assert!(places.any(|ids| *ids == json!([1, 2])));
        }
    }
    let chunks = Chunks::of(body, &[], 16, Seed::default());
    assert!(chunks.hashes.len() <= body.len() / 64);
}

/// Ends a text that a template has made.
const END: &str = "<|im_end|>";
const TEMPLATE: &str = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}\
    {%- for m in messages -%}<|im_start|>{{ m.role }}\n\
    {% if m.content is string %}{{ m.content | trim }}{% else %}\
    {% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\
    {% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson(indent=2) }}\
    {% endfor %}<|im_end|>\n{% endfor -%}\
    {{ documents }}{{ reasoning_effort | default('none') | upper }}{{ strftime_now('%Y') | length }}";

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("kv-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    let trainer = BpeTrainer::builder().vocab_size(400).show_progress(false);
    let mut trainer = TrainerWrapper::BpeTrainer(trainer.build());
    let text = "the router sends each request to the worker that holds its prefix";
    tokenizer
        .train(&mut trainer, [text].into_iter())
        .expect("a tokenizer");
    let special = ["<|im_start|>", END].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).expect("tokens");
    let file = folder.join("tokenizer.json");
    tokenizer.save(file, false).expect("a file");
    std::fs::write(folder.join("chat_template.jinja"), TEMPLATE).expect("a file");
    let model = Model::load(&folder, 1 << 20, 7).expect("a model");
    std::fs::remove_dir_all(&folder).expect("a folder");
    assert!(model.tokens.encoder().cuts().any());
    model.with_window(64)
});

/// Bodies as the sidecar reads them: refused or rendered, and tokenized alike as a whole and in
/// parts.
pub fn prompt(bytes: &[u8]) {
    let Some((choice, body)) = split(bytes) else {
        return;
    };
    let surface = Surface::ALL[choice % Surface::ALL.len()];
    let template = MODEL.template.as_ref().expect("a template");
    let text = match Prompt::parse(surface, body) {
        Err(_) => return,
        Ok(Prompt::Text { text, .. }) => text,
        Ok(Prompt::Chat(chat)) => {
            let takes_parts = choice >= 128;
            let Ok(text) = template.render(&chat.into_chat(takes_parts)) else {
                return;
            };
            text
        }
    };
    // What follows is found in short texts too.
    let short = text.floor_char_boundary(MAX_TEXT);
    let text = &text[..short];
    let whole = MODEL.tokens.encoder().whole(text).expect("ids");
    for _ in 0..2 {
        let encoded = MODEL.tokens.encode(text, None).expect("ids");
        assert!(encoded.complete);
        assert_eq!(encoded.ids, whole);
    }
}

/// Streams of answers: events and usage are the same wherever parts end.
pub fn answer_stream(bytes: &[u8]) {
    let Some((choice, stream)) = split(bytes) else {
        return;
    };
    let count = Events::new().feed(stream);
    let (mut events, mut growth) = (Events::new(), Growth::new(7, 4, 100));
    let (mut parts, mut whole) = (Usage::new(0), Usage::new(0));
    let (mut last, mut blocks) = (0, 0_u32);
    for piece in stream.chunks(1 + choice) {
        last = events.feed(piece);
        blocks += growth.feed(piece).map_or(0, |(blocks, _)| blocks);
        let (start, size) = Usage::wanted(piece.len());
        parts.take(&piece[start..start + size]);
    }
    assert_eq!(last, count);
    assert_eq!(blocks, count.saturating_add(7).div_ceil(4) - 2);
    let (start, size) = Usage::wanted(stream.len());
    whole.take(&stream[start..start + size]);
    assert_eq!(parts.found(), whole.found());
}

/// A message as what is said in a conversation.
pub(crate) fn chat(message: &[u8]) -> Vec<u8> {
    let said = String::from_utf8_lossy(message);
    let call = json!({"id": "1", "function": {"name": "f", "arguments": "{\"a\": [1]}"}});
    let body = json!({
        "model": "m",
        "messages": [
            {"role": "system", "content": "the router"},
            {"role": "user", "content": [{"type": "text", "text": said}]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "nvext": {"x": 1},
    });
    let surface = Surface::ALL.iter().position(|s| *s == Surface::Chat);
    let first = u8::try_from(surface.unwrap_or_default()).unwrap_or_default();
    [&[first], body.to_string().as_bytes()].concat()
}

/// A message as what is answered.
pub(crate) fn streamed(message: &[u8]) -> Vec<u8> {
    let said = json!({"text": String::from_utf8_lossy(message)});
    let usage = json!({"usage": {"prompt_tokens_details": {"cached_tokens": 512}}});
    format!("\x07data: {said}\n\ndata: {usage}\n\ndata: [DONE]\n\n").into_bytes()
}
