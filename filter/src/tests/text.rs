//! Prompts that are text: the question, the wait, and whatever may come of it.

use kv_core::family::Scheme;
use kv_core::handover::Handover;
use kv_core::holdings::Named;
use kv_core::id::Family;
use kv_core::surface::Surface;
use kv_core::text::{Answer, Ask, Blocks, Budget, Extent, Further, Refusal};
use kv_core::wire;

use super::*;
use crate::host::Token;
use crate::request::DECISION;

const CHAT: &[u8] =
    br#"{"model":"m","cache_salt":"s","messages":[{"role":"user","content":"hi"}]}"#;

const BUDGET: Budget = Budget {
    base_ms: 20,
    per_thousand_words_ms: 2,
};

fn site(held: &[(usize, Slot, &[u32])]) -> Site {
    let site = Site::new();
    let mut table = table(4, Mode::Kv);
    table.pools[0].text = Some(BUDGET);
    site.publish(&table, held);
    site
}

impl Site {
    /// A request on this path up to its body's end.
    fn send(&mut self, path: &str, body: &[u8]) -> (u32, Action) {
        let headers = [GENERATE[0], (":path", path.as_bytes()), GENERATE[2]];
        let context = self.request(&headers);
        assert_eq!(self.vm.on_request_headers(context, false), Action::Pause);
        (context, self.part(context, body, true))
    }

    /// A chat whose prompt the sidecar is asked about.
    fn ask(&mut self) -> u32 {
        let (context, action) = self.send("/v1/chat/completions", CHAT);
        assert_eq!(action, Action::Pause);
        assert_eq!(self.destination(), None);
        context
    }

    fn token(&self) -> Token {
        Token(1_000 + u32::try_from(self.host.calls().len()).unwrap())
    }

    fn answer(&mut self, context: u32, message: &[u8]) {
        let size = self.host.deliver(message);
        self.vm.on_call_over(context, self.token(), Some(size));
    }

    fn say(&mut self, context: u32, answer: &Answer<'_>) {
        self.answer(context, &wire::encode(answer));
    }
}

fn hashes(tokens: &[u32], seed: Seed) -> Vec<u8> {
    let hashes = sequence_hashes(tokens, Hashing::new(BLOCK as usize, seed));
    hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect()
}

fn read(tokens: u32, extent: Extent, hashes: &[u8]) -> Answer<'_> {
    Answer::Read(Blocks {
        tokens,
        extent,
        hashes,
    })
}

#[test]
fn a_text_is_routed_as_its_token_ids() {
    let tokens = prompt(1, 43);
    let mut site = site(&[(0, Slot(1), &tokens[..20]), (0, Slot(2), &tokens[..40])]);
    let context = site.ask();
    let calls = site.host.calls();
    assert_eq!((calls[0].context, calls[0].timeout_ms), (ROOT, 21));
    let ask: Ask<'_> = wire::decode(&calls[0].message).unwrap();
    assert_eq!((ask.pool, ask.surface), ("default", Surface::Chat));
    assert_eq!((ask.block_size, ask.body), (BLOCK, CHAT));
    assert_eq!(ask.seed, Seed::new("", "s").0);

    site.say(
        context,
        &read(43, Extent::Whole, &hashes(&tokens, Seed::default())),
    );
    assert_eq!(site.host.resumed(context), 1);
    assert_eq!(site.destination(), Some(endpoint(2)));
    assert_eq!(site.routed("default", "kv"), 1);
    let load = site.load(12);
    assert_eq!((load.prefill_tokens, load.blocks), (3, 10));
    site.vm.on_response_headers(context);
    let record = site.host.text(Headers::Response, DECISION).unwrap();
    assert!(record.contains("\"reason\":\"kv\""), "{record}");
    site.over(context);
    site.assert_idle();
}

#[test]
fn a_text_is_found_by_the_hashes_of_other_caches_too() {
    let tokens = prompt(1, 40);
    let mut table = table(4, Mode::Kv);
    table.pools[0].text = Some(BUDGET);
    table.pools[0].families = vec![Scheme {
        family: Family::VllmXxhashCbor,
        block_size: BLOCK,
        hash_seed: "0".into(),
    }];
    let mut site = Site::new();
    site.publish(&table, &[]);
    let context = site.ask();
    let calls = site.host.calls();
    let (_, wanted) = Ask::decode(&calls[0].message).unwrap();
    assert_eq!((wanted.salt, wanted.ids), ("s", false));
    assert_eq!(wanted.families[..], table.pools[0].families[..]);
    let families = vec![Named {
        family: Family::VllmXxhashCbor,
        blocks: 1,
        hashes: vec![1, 2],
    }];
    let known = hashes(&tokens, Seed::default());
    let answer = read(40, Extent::Whole, &known);
    let further = Further { families, ids: b"" };
    site.answer(context, &answer.encode(&further));
    assert_eq!(site.routed("default", "kv"), 1);
}

#[test]
fn token_ids_are_handed_over_where_the_pool_asks_for_it() {
    let mut table = table(4, Mode::Kv);
    table.pools[0].text = Some(BUDGET);
    table.pools[0].handover = Handover::Field;
    for length in [None, Some("15")] {
        let mut site = Site::new();
        site.publish(&table, &[]);
        let (context, _) = site.send("/v1/completions", br#"{"prompt":"hi"}"#);
        if let Some(length) = length {
            site.host.client_header("content-length", length.as_bytes());
        }
        let calls = site.host.calls();
        assert!(Ask::decode(&calls[0].message).unwrap().1.ids);
        let further = Further {
            ids: b"[1,22]",
            ..Further::default()
        };
        site.answer(context, &read(2, Extent::Whole, &[]).encode(&further));
        assert_eq!(site.host.resumed(context), 1);
        assert_eq!(site.host.body(0, 99), br#"{"prompt":[1,22]}"#);
        let told = site.host.text(Headers::Request, "content-length");
        assert_eq!(told.as_deref(), length.map(|_| "17"));
        assert_eq!(site.host.named("kv_router_handed_over_total"), 1);
    }
    // A chat has no place for them.
    let mut site = Site::new();
    site.publish(&table, &[]);
    site.ask();
    let calls = site.host.calls();
    assert!(!Ask::decode(&calls[0].message).unwrap().1.ids);
}

#[test]
fn without_tokenizer_and_events_chunks_of_the_text_are_looked_up() {
    let mut table = table(4, Mode::Kv);
    table.pools[0].chunks = true;
    let mut site = Site::new();
    site.publish(&table, &[]);
    let long = "x".repeat(40 * BLOCK as usize);
    let body = format!(r#"{{"messages":"{long}","tools":[]}}"#);
    let (_, action) = site.send("/v1/chat/completions", body.as_bytes());
    assert_eq!(action, Action::Continue);
    assert_eq!(site.host.calls().len(), 0);
    assert_eq!(site.routed("default", "kv_text"), 1);
    assert!(site.destination().is_some());
}

#[test]
fn a_beginning_is_routed_on() {
    let tokens = prompt(1, 40);
    for (extent, reason) in [
        (Extent::Deadline, "kv_beginning"),
        (Extent::Media, "kv_before_media"),
    ] {
        let mut site = site(&[(0, Slot(3), &tokens)]);
        let context = site.ask();
        let known = hashes(&tokens[..20], Seed::default());
        site.say(context, &read(400, extent, &known));
        assert_eq!(site.destination(), Some(endpoint(3)));
        assert_eq!(site.load(13).prefill_tokens, 380);
        assert_eq!(site.routed("default", reason), 1);
    }
}

#[test]
fn whatever_is_answered_the_request_goes_on_once() {
    let refused = |refusal| wire::encode(&Answer::Refused(refusal));
    let cases = [
        (refused(Refusal::NoTokenizer), "text"),
        (refused(Refusal::Template), "text_refused"),
        (refused(Refusal::Malformed), "text_refused"),
        (refused(Refusal::Overloaded), "text_overloaded"),
        (refused(Refusal::Deadline), "text_late"),
        (refused(Refusal::Engine), "text_failed"),
        (Vec::new(), "text_failed"),
        (vec![0xff; 300], "text_failed"),
        (b"\x02rubbish".to_vec(), "text_failed"),
        (wire::encode(&read(u32::MAX, Extent::Whole, &[7; 13])), "kv"),
    ];
    for (message, reason) in cases {
        let mut site = site(&[]);
        let context = site.ask();
        site.answer(context, &message);
        site.answer(context, &message);
        assert_eq!(site.host.resumed(context), 1, "{reason}");
        assert!(site.destination().is_some(), "{reason}");
        assert_eq!(site.routed("default", reason), 1, "{reason}");
        site.over(context);
        site.assert_idle();
    }
}

#[test]
fn without_an_answer_the_request_goes_by_load() {
    for (ms, reason) in [(1, "text_failed"), (25, "text_late")] {
        let mut site = site(&[]);
        let context = site.ask();
        site.host.advance_ms(ms);
        site.vm.on_call_over(context, site.token(), None);
        assert_eq!(site.host.resumed(context), 1);
        assert_eq!(site.routed("default", reason), 1);
    }
}

#[test]
fn a_call_that_fails_at_once_holds_nothing_up() {
    let mut site = site(&[]);
    site.host.refuse_streams(true);
    let (_, action) = site.send("/v1/chat/completions", CHAT);
    assert_eq!(action, Action::Continue);
    assert_eq!(site.routed("default", "text_failed"), 1);
}

#[test]
fn a_client_that_leaves_while_its_prompt_is_read_leaves_nothing() {
    let mut site = site(&[]);
    let context = site.ask();
    site.over(context);
    site.say(context, &read(9, Extent::Whole, &[]));
    assert_eq!(site.host.resumed(context), 0);
    site.assert_idle();
}

#[test]
fn every_api_with_text_asks_and_the_others_do_not() {
    let asks: [(&str, &[u8]); 8] = [
        ("/v1/completions", br#"{"prompt":"hi"}"#),
        ("/v1/completions", br#"{"prompt":["hi"]}"#),
        ("/v1/chat/completions?x=1", CHAT),
        ("/v1/responses", br#"{"input":"hi"}"#),
        ("/v1/messages", CHAT),
        ("/generate", br#"{"text":"hi"}"#),
        ("/v1/chat/completions", br#"{"messages":[],"nvext":{}}"#),
        (
            "/v1/chat/completions",
            br#"{"messages":[],"nvext":{"token_data":[]x}}"#,
        ),
    ];
    for (path, body) in asks {
        let mut site = site(&[]);
        assert_eq!(site.send(path, body).1, Action::Pause, "{path}");
        assert_eq!(site.host.calls().len(), 1);
    }
    let ids: [(&str, &[u8], &str); 8] = [
        ("/v1/completions", br#"{"prompt":[[1,2,3,4]]}"#, "kv"),
        ("/generate", br#"{"input_ids":[1,2,3,4]}"#, "kv"),
        ("/generate", br#"{}"#, "no_prompt"),
        (
            "/inference/v1/generate",
            br#"{"token_ids":[1,2,3,4]}"#,
            "kv",
        ),
        (
            "/v1/chat/completions",
            br#"{"messages":[],"nvext":{"token_data":[1,2,3,4]}}"#,
            "kv",
        ),
        ("/v1/embeddings", br#"{"input":"hi"}"#, "no_reuse"),
        (
            "/v1/chat/completions",
            br#"{"prompt":[1,2,3,4]}"#,
            "no_prompt",
        ),
        (
            "/v1/chat/completions",
            br#"{"messages":[],"cache_salt":7}"#,
            "no_prompt",
        ),
    ];
    for (path, body, reason) in ids {
        let mut site = site(&[]);
        assert_eq!(site.send(path, body).1, Action::Continue, "{path}");
        assert_eq!(site.host.calls().len(), 0, "{path}");
        assert_eq!(site.routed("default", reason), 1, "{path}");
    }
}

#[test]
fn a_text_is_held_back_at_its_trailers_too() {
    let mut site = site(&[]);
    let headers = [GENERATE[0], (":path", b"/v1/chat/completions"), GENERATE[2]];
    let context = site.request(&headers);
    site.vm.on_request_headers(context, false);
    site.part(context, CHAT, false);
    assert_eq!(site.vm.on_request_trailers(context), Action::Pause);
    site.say(context, &read(9, Extent::Whole, &[]));
    assert_eq!(site.host.resumed(context), 1);
    assert_eq!(site.vm.on_request_trailers(context), Action::Continue);
}

#[test]
fn models_are_listed_and_unknown_ones_refused() {
    let mut site = Site::new();
    let mut table = table(2, Mode::Kv);
    table.pools[0].models = vec!["m".into()];
    site.publish(&table, &[]);
    let list = [(":method", &b"GET"[..]), (":path", b"/v1/models")];
    // The first request reads the table.
    site.complete(br#"{"model":"m","prompt":[1]}"#);
    let context = site.request(&list);
    assert_eq!(site.vm.on_request_headers(context, true), Action::Pause);
    let (status, body) = site.host.replied().unwrap();
    assert_eq!(status, 200);
    assert!(String::from_utf8(body).unwrap().contains("\"id\":\"m\""));
    assert_eq!(site.routed("none", "answered"), 1);
    site.over(context);

    let (context, _) = site.post();
    let action = site.part(context, br#"{"model":"other","prompt":[1]}"#, true);
    assert_eq!(action, Action::Pause);
    let (status, body) = site.host.replied().unwrap();
    assert_eq!(status, 404);
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"]["code"], "model_not_found");
    site.over(context);
    // Without a model the first pool serves.
    site.complete(br#"{"prompt":[1]}"#);
    assert!(site.destination().is_some());
}

/// The stream of questions, once a request has come and a tick has opened it.
fn stream(site: &mut Site) -> Token {
    let context = site.ask();
    site.vm.on_call_over(context, site.token(), None);
    site.over(context);
    let before = site.host.streams().len();
    site.host.advance_ms(50);
    site.vm.on_tick(ROOT);
    let streams = site.host.streams();
    assert!(streams.len() > before && streams.last().unwrap().open);
    Token(u32::try_from(streams.len() - 1).unwrap())
}

impl Site {
    fn say_on(&mut self, stream: Token, number: u64, answer: &Answer<'_>) {
        let message = [&number.to_le_bytes()[..], &wire::encode(answer)].concat();
        let size = self.host.deliver(&message);
        self.vm.on_stream_message(ROOT, stream, size);
    }
}

#[test]
fn questions_on_the_stream_find_their_answers_by_number() {
    let tokens = prompt(1, 43);
    let mut site = site(&[(0, Slot(1), &tokens[..20]), (0, Slot(2), &tokens[..40])]);
    let stream = stream(&mut site);
    let [one, two, gone] = [(); 3].map(|()| site.ask());
    site.over(gone);
    let sent = &site.host.streams()[stream.0 as usize].sent;
    assert_eq!((sent.len(), site.host.calls().len()), (3, 1));
    assert_eq!(site.host.named("kv_router_text_calls_total"), 1);
    let (number, question) = kv_core::text::numbered(&sent[1]).unwrap();
    assert_eq!(number, 1);
    assert_eq!(Ask::decode(question).unwrap().0.body, CHAT);
    let known = hashes(&tokens, Seed::default());
    let answer = read(43, Extent::Whole, &known);
    site.say_on(stream, 2, &answer);
    for (number, context) in [(1, two), (0, one)] {
        site.say_on(stream, number, &answer);
        site.say_on(stream, number, &answer);
        assert_eq!(site.host.resumed(context), 1);
        assert_eq!(site.destination(), Some(endpoint(2)));
    }
    assert_eq!(site.host.resumed(gone), 0);
    site.over(one);
    site.over(two);
    site.assert_idle();
}

#[test]
fn while_a_question_on_the_stream_is_late_others_are_asked_by_calls() {
    let mut site = site(&[]);
    let stream = stream(&mut site);
    let context = site.ask();
    site.vm.on_tick(ROOT);
    assert_eq!(site.host.resumed(context), 0);
    site.host.advance_ms(50);
    site.vm.on_tick(ROOT);
    assert_eq!(site.host.resumed(context), 1);
    assert_eq!(site.routed("default", "text_late"), 1);
    let calls = site.host.calls().len();
    let other = site.ask();
    assert_eq!(site.host.calls().len(), calls + 1);
    site.vm.on_call_over(other, site.token(), None);
    // Answered, late as it is.
    site.say_on(stream, 0, &read(9, Extent::Whole, &[]));
    assert_eq!(site.host.resumed(context), 1);
    let third = site.ask();
    assert_eq!(site.host.calls().len(), calls + 1);
    // Never answered.
    site.host.advance_ms(10_100);
    site.vm.on_tick(ROOT);
    assert!(!site.host.streams()[stream.0 as usize].open);
    assert_eq!(site.host.resumed(third), 1);
}

#[test]
fn a_stream_that_ends_leaves_nobody_waiting() {
    let mut site = site(&[]);
    let stream = stream(&mut site);
    let context = site.ask();
    site.vm.on_stream_close(stream);
    assert_eq!(site.host.resumed(context), 1);
    let before = site.routed("default", "text_failed");
    assert!(before >= 1);
    site.ask();
    assert_eq!(site.host.calls().len(), 2);
    site.host.advance_ms(200);
    site.vm.on_tick(ROOT);
    let stream = Token(u32::try_from(site.host.streams().len() - 1).unwrap());
    let context = site.ask();
    assert_eq!(site.host.calls().len(), 2);
    // The root context ends.
    site.vm.on_done(ROOT);
    assert!(!site.host.streams()[stream.0 as usize].open);
    assert_eq!(site.host.resumed(context), 1);
}
