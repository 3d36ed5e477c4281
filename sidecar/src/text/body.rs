//! The prompt in a request's body.

use std::collections::BTreeMap;

use kv_core::surface::Surface;
use minijinja::value::Value;
use serde_json::value::RawValue;

use super::chat::{Fields, Message, Part, given, object, ordered, parts, read, tool};
use super::template::Chat;
use super::vision::Image;

/// Messages of one conversation.
const MAX_MESSAGES: usize = 10_000;

/// Why no prompt can be made of a body.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is no JSON, or a value is of the wrong type.
    #[error("body: {0}")]
    Json(#[from] serde_json::Error),
    /// Something must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A part of a message that nothing is known of.
    #[error("a part of type {0:?}")]
    Part(String),
    /// It asks for something that only the engine knows.
    #[error("{0} is not understood")]
    Unknown(&'static str),
    /// Too many messages.
    #[error("{0} messages, at most {MAX_MESSAGES} are read")]
    TooMany(usize),
}

/// What is to be tokenized.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Whether the tokenizer's own special tokens go around it.
        special: bool,
    },
    /// A conversation.
    Chat(Conversation),
}

/// A conversation, before it is known what its template takes.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    messages: Vec<Message>,
    tools: Vec<Value>,
    documents: Value,
    add_generation_prompt: bool,
    continue_final_message: bool,
    special: bool,
    sees: bool,
    kwargs: BTreeMap<String, Value>,
}

impl Conversation {
    /// Whether the tokenizer's own special tokens go around what the template makes.
    #[must_use]
    pub fn special(&self) -> bool {
        self.special
    }

    /// Whether there is an image, sound or film.
    #[must_use]
    pub fn has_media(&self) -> bool {
        self.messages.iter().any(Message::has_media)
    }

    /// The images before the first thing that is neither text nor a known image, and whether there
    /// is no such.
    #[must_use]
    pub fn images(&self) -> (Vec<Image>, bool) {
        let all: Vec<Option<&Image>> = self.messages.iter().flat_map(Message::media).collect();
        let known = all.iter().map_while(|image| image.cloned());
        let known: Vec<Image> = known.collect();
        let is_all = known.len() == all.len();
        (known, is_all)
    }

    /// The same for a model that sees: its template writes placeholders of known images.
    #[must_use]
    pub fn seeing(self) -> Self {
        Self { sees: true, ..self }
    }

    /// What a template is given.
    #[must_use]
    pub fn into_chat(self, takes_parts: bool) -> Chat {
        let messages = self.messages.into_iter();
        let messages: Vec<Value> = messages
            .map(|m| m.into_value(takes_parts, self.sees))
            .collect();
        Chat {
            messages: messages.into(),
            tools: if self.tools.is_empty() {
                Value::UNDEFINED
            } else {
                self.tools.into()
            },
            documents: self.documents,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs,
        }
    }
}

impl Prompt {
    /// The prompt of a body.
    ///
    /// # Errors
    /// When there is none that could be read.
    pub fn parse(surface: Surface, body: &[u8]) -> Result<Self, BodyError> {
        let fields: Fields<'_> = serde_json::from_slice(body)?;
        for key in ["truncate_prompt_tokens", "chat_template", "prompt_embeds"] {
            if given(&fields, key).is_some() {
                return Err(BodyError::Unknown("a prompt that is altered"));
            }
        }
        match surface {
            Surface::Completions => text(&fields, "prompt"),
            Surface::Generate => text(&fields, "text"),
            Surface::Chat => Ok(Self::Chat(chat(&fields)?)),
            Surface::Responses => Ok(Self::Chat(response(&fields)?)),
            Surface::Messages => Ok(Self::Chat(anthropic(&fields)?)),
            Surface::Embeddings | Surface::Inference => Err(BodyError::Unknown("the path")),
        }
    }
}

fn text(fields: &Fields<'_>, key: &'static str) -> Result<Prompt, BodyError> {
    let raw = given(fields, key).ok_or(BodyError::Missing("a text"))?;
    let text = if raw.get().starts_with('[') {
        let mut texts: Vec<String> = read(raw)?;
        if texts.len() != 1 {
            return Err(BodyError::Unknown("more than one prompt"));
        }
        texts.swap_remove(0)
    } else {
        read(raw)?
    };
    Ok(Prompt::Text {
        text,
        special: flag(fields, "add_special_tokens", true)?,
    })
}

fn flag(fields: &Fields<'_>, key: &str, default: bool) -> Result<bool, BodyError> {
    given(fields, key).map_or(Ok(default), read)
}

fn list<'a>(fields: &Fields<'a>, key: &'static str) -> Result<Vec<&'a RawValue>, BodyError> {
    let list: Vec<&RawValue> = read(given(fields, key).ok_or(BodyError::Missing(key))?)?;
    if list.len() > MAX_MESSAGES {
        return Err(BodyError::TooMany(list.len()));
    }
    Ok(list)
}

fn chat(fields: &Fields<'_>) -> Result<Conversation, BodyError> {
    let messages = list(fields, "messages")?;
    let messages = messages.into_iter().map(Message::of_chat);
    let mut messages: Vec<Message> = messages.collect::<Result<_, _>>()?;
    // They change both what an image becomes and its name.
    if given(fields, "mm_processor_kwargs").is_some() {
        messages.iter_mut().for_each(Message::close_eyes);
    }
    let tools: Vec<&RawValue> = given(fields, "tools").map_or(Ok(Vec::new()), read)?;
    let mut kwargs = BTreeMap::new();
    for key in ["chat_template_kwargs", "chat_template_args"] {
        if let Some(raw) = given(fields, key) {
            kwargs.extend(ordered(raw)?);
        }
    }
    if let Some(raw) = given(fields, "reasoning_effort") {
        kwargs.insert("reasoning_effort".into(), read(raw)?);
    }
    Ok(Conversation {
        messages,
        tools: tools.into_iter().map(tool).collect::<Result<_, _>>()?,
        documents: given(fields, "documents").map_or(Ok(Value::UNDEFINED), read)?,
        add_generation_prompt: flag(fields, "add_generation_prompt", true)?,
        continue_final_message: flag(fields, "continue_final_message", false)?,
        special: flag(fields, "add_special_tokens", false)?,
        sees: false,
        kwargs,
    })
}

/// A request of the responses API.
fn response(fields: &Fields<'_>) -> Result<Conversation, BodyError> {
    for key in ["previous_response_id", "conversation"] {
        if given(fields, key).is_some() {
            return Err(BodyError::Unknown("a conversation that the engine keeps"));
        }
    }
    let mut messages = Vec::new();
    if let Some(raw) = given(fields, "instructions") {
        messages.push(Message::new("system", read(raw)?));
    }
    let input = given(fields, "input").ok_or(BodyError::Missing("input"))?;
    if input.get().starts_with('"') {
        messages.push(Message::new("user", read(input)?));
    } else {
        for item in list(fields, "input")? {
            messages.push(item_of_response(item)?);
        }
    }
    let tools: Vec<&RawValue> = given(fields, "tools").map_or(Ok(Vec::new()), read)?;
    let tools = tools.into_iter().map(|raw| {
        let function = object([("type", "function".into()), ("function", read(raw)?)]);
        Ok::<_, BodyError>(function)
    });
    Ok(Conversation {
        messages,
        tools: tools.collect::<Result<_, _>>()?,
        add_generation_prompt: true,
        ..Conversation::default()
    })
}

fn item_of_response(raw: &RawValue) -> Result<Message, BodyError> {
    let item: Fields<'_> = read(raw)?;
    let kind: String = given(&item, "type").map_or(Ok("message".into()), read)?;
    match kind.as_str() {
        "message" => Message::of_chat(raw),
        "function_call" => {
            let mut message = Message {
                role: "assistant".into(),
                content: Vec::new(),
                more: Vec::new(),
            };
            let of = |key| given(&item, key).ok_or(BodyError::Missing(key));
            let call = format!(
                r#"{{"id":{},"function":{{"name":{},"arguments":{}}},"type":"function"}}"#,
                of("call_id")?.get(),
                of("name")?.get(),
                of("arguments")?.get()
            );
            let call = RawValue::from_string(call)?;
            message.call(&[&call])?;
            Ok(message)
        }
        "function_call_output" => {
            let output = given(&item, "output").ok_or(BodyError::Missing("output"))?;
            let mut message = Message {
                content: parts(output)?,
                ..Message::new("tool", String::new())
            };
            if let Some(raw) = given(&item, "call_id") {
                message.more.push(("tool_call_id", read(raw)?));
            }
            Ok(message)
        }
        _ => Err(BodyError::Unknown("an item of input")),
    }
}

/// A request of Anthropic's API, in the words of the chat API.
fn anthropic(fields: &Fields<'_>) -> Result<Conversation, BodyError> {
    let mut messages = Vec::new();
    if let Some(raw) = given(fields, "system") {
        // Unlike other contents these are joined by nothing.
        let text: String = parts(raw)?.into_iter().filter_map(text_of).collect();
        messages.push(Message::new("system", text));
    }
    for raw in list(fields, "messages")? {
        message_of_anthropic(raw, &mut messages)?;
    }
    let tools: Vec<&RawValue> = given(fields, "tools").map_or(Ok(Vec::new()), read)?;
    let tools = tools.into_iter().map(|raw| {
        let tool: Fields<'_> = read(raw)?;
        let of = |key: &str| given(&tool, key).map_or(Ok(Value::from(())), read);
        let function = object([
            ("name", of("name")?),
            ("description", of("description")?),
            ("parameters", of("input_schema")?),
        ]);
        let all = [("type", "function".into()), ("function", function)];
        Ok::<_, BodyError>(object(all))
    });
    Ok(Conversation {
        messages,
        tools: tools.collect::<Result<_, _>>()?,
        add_generation_prompt: true,
        ..Conversation::default()
    })
}

fn text_of(part: Part) -> Option<String> {
    match part {
        Part::Text(text) => Some(text),
        Part::Media(_) => None,
    }
}

fn message_of_anthropic(raw: &RawValue, messages: &mut Vec<Message>) -> Result<(), BodyError> {
    let fields: Fields<'_> = read(raw)?;
    let role: String = read(given(&fields, "role").ok_or(BodyError::Missing("role"))?)?;
    let content = given(&fields, "content").ok_or(BodyError::Missing("content"))?;
    if content.get().starts_with('"') {
        messages.push(Message::new(&role, read(content)?));
        return Ok(());
    }
    let mut message = Message {
        role,
        content: Vec::new(),
        more: Vec::new(),
    };
    let mut calls = Vec::new();
    for raw in list(&fields, "content")? {
        let block: Fields<'_> = read(raw)?;
        let kind: String = read(given(&block, "type").ok_or(BodyError::Missing("type"))?)?;
        match kind.as_str() {
            "tool_use" => {
                let of = |key| given(&block, key).ok_or(BodyError::Missing(key));
                let call = format!(
                    r#"{{"id":{},"type":"function","function":{{"name":{},"arguments":{}}}}}"#,
                    of("id")?.get(),
                    of("name")?.get(),
                    given(&block, "input").map_or("{}", RawValue::get)
                );
                calls.push(RawValue::from_string(call)?);
            }
            "tool_result" => {
                let content = given(&block, "content").map_or(Ok(Vec::new()), parts)?;
                let text = content.into_iter().filter_map(text_of).collect::<String>();
                let mut result = Message::new("tool", text);
                if let Some(raw) = given(&block, "tool_use_id") {
                    result.more.push(("tool_call_id", read(raw)?));
                }
                messages.push(result);
            }
            _ => {
                let block = RawValue::from_string(format!("[{}]", raw.get()))?;
                message.content.extend(parts(&block)?);
            }
        }
    }
    let calls: Vec<&RawValue> = calls.iter().map(AsRef::as_ref).collect();
    message.call(&calls)?;
    if !(message.content.is_empty() && calls.is_empty()) {
        messages.push(message);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::template::{Source, Template};

    /// Writes down all that it is given.
    const PLAIN: &str = "{% for m in messages %}[{{ m | tojson }}]{% endfor %}\
        {% if tools %}{{ tools | tojson }}{% endif %}{{ thinking }}";

    fn rendered(surface: Surface, body: &str) -> String {
        let template = Template::new(Source::One(PLAIN.into()), BTreeMap::new()).unwrap();
        match Prompt::parse(surface, body.as_bytes()).unwrap() {
            Prompt::Chat(chat) => template.render(&chat.into_chat(false)).unwrap(),
            Prompt::Text { text, .. } => text,
        }
    }

    #[test]
    fn messages_reach_a_template_as_vllm_hands_them_over() {
        let body = r#"{"messages":[
            {"role":"system","content":"a"},
            {"content":[{"type":"text","text":"b"},{"text":"c"}],"role":"user","name":"me","x":1},
            {"role":"assistant","content":null,"reasoning_content":"r","tool_calls":[
                {"id":"1","type":"function","function":{"name":"f","arguments":"{\"z\": 1, \"a\": [2]}"}}]},
            {"role":"tool","tool_call_id":"1","content":"d"}],
            "chat_template_kwargs":{"thinking":"yes"},"messages_":[]}"#;
        assert_eq!(
            rendered(Surface::Chat, body),
            concat!(
                r#"[{"role": "system", "content": "a"}]"#,
                r#"[{"role": "user", "content": "b\nc", "name": "me"}]"#,
                r#"[{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": [2]}}}], "thinking": "r", "reasoning": "r", "reasoning_content": "r"}]"#,
                r#"[{"role": "tool", "content": "d", "tool_call_id": "1"}]yes"#
            )
        );
    }

    #[test]
    fn tools_are_written_down_whole() {
        let body = r#"{"messages":[],"tools":[{"function":{"parameters":{"b":1,"a":2},"name":"f","strict":true},"type":"function"}]}"#;
        assert_eq!(
            rendered(Surface::Chat, body),
            r#"[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": 2}, "strict": true}}]"#
        );
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let body = r#"{"prompt":"a","prompt":["b"],"model":"m"}"#;
        assert_eq!(rendered(Surface::Completions, body), "b");
    }

    #[test]
    fn other_apis_are_put_into_the_words_of_chat() {
        let body = r#"{"system":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"messages":[
            {"role":"user","content":"c"},
            {"role":"assistant","content":[{"type":"text","text":"d"},{"type":"tool_use","id":"1","name":"f","input":{"x":1}}]},
            {"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":"e"}]}]}"#;
        assert_eq!(
            rendered(Surface::Messages, body),
            concat!(
                r#"[{"role": "system", "content": "ab"}][{"role": "user", "content": "c"}]"#,
                r#"[{"role": "assistant", "content": "d", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}]"#,
                r#"[{"role": "tool", "content": "e", "tool_call_id": "1"}]"#
            )
        );
        let body = r#"{"instructions":"a","input":[{"role":"user","content":[{"type":"input_text","text":"b"}]},
            {"type":"function_call","call_id":"1","name":"f","arguments":"{}"},
            {"type":"function_call_output","call_id":"1","output":"c"}]}"#;
        assert_eq!(
            rendered(Surface::Responses, body),
            concat!(
                r#"[{"role": "system", "content": "a"}][{"role": "user", "content": "b"}]"#,
                r#"[{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}, "type": "function"}]}]"#,
                r#"[{"role": "tool", "content": "c", "tool_call_id": "1"}]"#
            )
        );
    }

    #[test]
    fn hostile_bodies_are_refused() {
        let deep = "[".repeat(100_000);
        let many = "{\"role\":\"user\",\"content\":\"x\"},".repeat(MAX_MESSAGES);
        for body in [
            "".to_owned(),
            "[]".to_owned(),
            "{}".to_owned(),
            "{\"messages\":{}}".to_owned(),
            "{\"messages\":[{\"content\":\"x\"}]}".to_owned(),
            "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"odd\"}]}]}".to_owned(),
            format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{deep}"),
            format!("{{\"messages\":[{many}{{\"role\":\"user\"}}]}}"),
            "{\"messages\":[],\"chat_template\":\"{{ 7 }}\"}".to_owned(),
        ] {
            assert!(Prompt::parse(Surface::Chat, body.as_bytes()).is_err());
        }
        let broken = b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}";
        assert!(Prompt::parse(Surface::Chat, broken).is_err());
    }
}
