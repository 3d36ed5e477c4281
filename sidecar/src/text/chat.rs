//! Messages as engines hand them to chat templates: the rules of vLLM's chat utilities.

use std::borrow::Cow;
use std::collections::HashMap;

use indexmap::IndexMap;
use minijinja::value::Value;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::body::BodyError;
use super::vision::Image;

/// Stands for an image, sound or film in the text of a template, until the text is cut there.
pub(super) const MEDIA: &str = "\u{f8ff}kv-media\u{f8ff}";

/// The members of a JSON object; of equal keys the last one counts.
pub(super) type Fields<'a> = HashMap<Cow<'a, str>, &'a RawValue>;

/// Reads any JSON value.
pub(super) fn read<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Result<T, BodyError> {
    Ok(serde_json::from_str(raw.get())?)
}

/// A member that is there and not `null`.
pub(super) fn given<'a>(fields: &Fields<'a>, key: &str) -> Option<&'a RawValue> {
    let raw = fields.get(key).copied();
    raw.filter(|raw| raw.get() != "null")
}

/// A part of a message's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Text.
    Text(String),
    /// An image, sound or film; an image of which all is known that counts.
    Media(Option<Image>),
}

/// A message before it is given to a template.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// Who speaks.
    pub(super) role: String,
    /// What is said.
    pub(super) content: Vec<Part>,
    /// Further variables of the message, in their order.
    pub(super) more: Vec<(&'static str, Value)>,
}

impl Message {
    /// A message of text.
    pub(super) fn new(role: &str, text: String) -> Self {
        Self {
            role: role.to_owned(),
            content: vec![Part::Text(text)],
            more: Vec::new(),
        }
    }

    /// A message of the chat API.
    pub(super) fn of_chat(raw: &RawValue) -> Result<Self, BodyError> {
        let fields: Fields<'_> = read(raw)?;
        let role: String = read(given(&fields, "role").ok_or(BodyError::Missing("role"))?)?;
        let content = match given(&fields, "content") {
            Some(raw) => parts(raw)?,
            None => Vec::new(),
        };
        let mut message = Self {
            content,
            more: Vec::new(),
            role,
        };
        match message.role.as_str() {
            "assistant" => {
                if let Some(raw) = given(&fields, "tool_calls") {
                    let calls: Vec<&RawValue> = read(raw)?;
                    message.call(&calls)?;
                }
                let reasoning = given(&fields, "reasoning");
                if let Some(raw) = reasoning.or_else(|| given(&fields, "reasoning_content")) {
                    let reasoning: Value = read(raw)?;
                    message.more.push(("thinking", reasoning.clone()));
                    message.more.push(("reasoning", reasoning.clone()));
                    message.more.push(("reasoning_content", reasoning));
                }
            }
            "tool" => message.take(&fields, "tool_call_id")?,
            "developer" => message.take(&fields, "tools")?,
            _ => {}
        }
        if given(&fields, "name").is_some_and(|raw| raw.get().starts_with('"')) {
            message.take(&fields, "name")?;
        }
        Ok(message)
    }

    /// Adds tool calls.
    pub(super) fn call(&mut self, calls: &[&RawValue]) -> Result<(), BodyError> {
        // An empty list is none: templates ask for its first item.
        if !calls.is_empty() {
            let calls = calls.iter().map(|raw| call(raw));
            let calls: Vec<Value> = calls.collect::<Result<_, _>>()?;
            self.more.push(("tool_calls", calls.into()));
        }
        Ok(())
    }

    /// Passes a member of the message on to the template.
    fn take(&mut self, fields: &Fields<'_>, key: &'static str) -> Result<(), BodyError> {
        if let Some(raw) = given(fields, key) {
            self.more.push((key, read(raw)?));
        }
        Ok(())
    }

    /// Whether it has anything that is not text.
    pub(super) fn has_media(&self) -> bool {
        self.media().next().is_some()
    }

    /// What is not text, in order.
    pub(super) fn media(&self) -> impl Iterator<Item = Option<&Image>> {
        self.content.iter().filter_map(|part| match part {
            Part::Media(image) => Some(image.as_ref()),
            Part::Text(_) => None,
        })
    }

    /// Forgets what is known of images.
    pub(super) fn close_eyes(&mut self) {
        for part in &mut self.content {
            if let Part::Media(image) = part {
                *image = None;
            }
        }
    }

    /// The message as a template gets it. One that goes through parts gets a list of them, with
    /// images to write the placeholder of if it `sees`; the others get one text, in which what
    /// stands for media comes first.
    pub(super) fn into_value(self, takes_parts: bool, sees: bool) -> Value {
        let has_media = self.has_media();
        let content = if takes_parts {
            let text = |text: Value| object([("type", "text".into()), ("text", text)]);
            let part = |part: Part| match part {
                Part::Text(said) => text(said.into()),
                Part::Media(Some(_)) if sees => object([("type", "image".into())]),
                Part::Media(_) => text(MEDIA.into()),
            };
            Value::from(self.content.into_iter().map(part).collect::<Vec<_>>())
        } else {
            let texts = self.content.into_iter().map(|part| match part {
                Part::Text(text) => text,
                Part::Media(_) => MEDIA.to_owned(),
            });
            let texts: Vec<String> = texts.collect();
            match (has_media, texts.as_slice()) {
                (true, _) => Value::from([MEDIA, &texts.join("\n")].join("\n")),
                (false, [text]) => Value::from(text.as_str()),
                (false, _) => Value::from(texts.join("\n")),
            }
        };
        let own = [("role", self.role.into()), ("content", content)];
        object(own.into_iter().chain(self.more))
    }
}

/// A map in this order.
pub(super) fn object<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let fields = fields.into_iter().map(|(key, value)| (key.into(), value));
    Value::from_object(fields.collect::<IndexMap<Value, Value>>())
}

/// The content of a message: a text, or a list of parts.
pub(super) fn parts(raw: &RawValue) -> Result<Vec<Part>, BodyError> {
    if raw.get().starts_with('"') {
        return Ok(vec![Part::Text(read(raw)?)]);
    }
    let list: Vec<&RawValue> = read(raw)?;
    list.into_iter().map(part).collect()
}

fn part(raw: &RawValue) -> Result<Part, BodyError> {
    if raw.get().starts_with('"') {
        return Ok(Part::Text(read(raw)?));
    }
    let fields: Fields<'_> = read(raw)?;
    let kind: String = match given(&fields, "type") {
        Some(raw) => read(raw)?,
        // Some clients leave it out where another key tells.
        None => {
            let mut media = fields.keys().filter(|key| is_media(key));
            media.next().map_or("text", |key| key).to_owned()
        }
    };
    let key = match kind.as_str() {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        "thinking" => "thinking",
        kind if is_media(kind) => return Ok(Part::Media(image(&fields))),
        _ => return Err(BodyError::Part(kind)),
    };
    let text = given(&fields, key).ok_or(BodyError::Missing(key))?;
    Ok(Part::Text(read(text)?))
}

/// An image as vLLM's clients name it: with `uuid` beside it.
fn image(fields: &Fields<'_>) -> Option<Image> {
    #[derive(Deserialize)]
    struct Url<'a> {
        #[serde(borrow)]
        url: Cow<'a, str>,
    }
    let name: String = read(given(fields, "uuid")?).ok()?;
    let url: Url<'_> = read(given(fields, "image_url")?).ok()?;
    Image::new(&url.url, &name)
}

fn is_media(kind: &str) -> bool {
    let kinds = ["image", "audio", "video", "file"];
    let kind = kind.strip_prefix("input_").unwrap_or(kind);
    kinds.iter().any(|media| kind.starts_with(media))
}

/// A tool call, its arguments an object: clients send them as text.
fn call(raw: &RawValue) -> Result<Value, BodyError> {
    let mut call: Vec<(String, Value)> = ordered(raw)?;
    let fields: Fields<'_> = read(raw)?;
    let function = given(&fields, "function").ok_or(BodyError::Missing("function"))?;
    let mut inner: Vec<(String, Value)> = ordered(function)?;
    let text = inner.iter().find(|(key, _)| key == "arguments");
    let arguments = match text.map(|(_, value)| value) {
        Some(value) if value.as_str().is_some_and(|text| !text.is_empty()) => {
            serde_json::from_str(value.as_str().unwrap_or_default())?
        }
        Some(value) if value.is_true() => value.clone(),
        Some(_) | None => object([]),
    };
    set(&mut inner, "arguments", arguments);
    set(&mut call, "function", map(&inner));
    Ok(map(&call))
}

/// A tool as engines' schemas write it down: what is missing is `null`, known keys come first.
pub(super) fn tool(raw: &RawValue) -> Result<Value, BodyError> {
    let fields: Fields<'_> = read(raw)?;
    let function = given(&fields, "function").ok_or(BodyError::Missing("function"))?;
    let kind = match given(&fields, "type") {
        Some(raw) => read(raw)?,
        None => Value::from("function"),
    };
    let inner = in_order(&["name", "description", "parameters"], &ordered(function)?);
    let known = [("type".to_owned(), kind), ("function".to_owned(), inner)];
    let others = ordered(raw)?.into_iter();
    let others = others.filter(|(key, _)| key != "type" && key != "function");
    let all: Vec<(String, Value)> = known.into_iter().chain(others).collect();
    Ok(map(&all))
}

/// The members, these first, `null` where missing.
fn in_order(first: &[&str], members: &[(String, Value)]) -> Value {
    let of = |key: &str| {
        let member = members.iter().find(|(k, _)| k == key);
        member.map_or(Value::from(()), |(_, value)| value.clone())
    };
    let mut all: Vec<(String, Value)> = first.iter().map(|k| ((*k).to_owned(), of(k))).collect();
    let others = members
        .iter()
        .filter(|(key, _)| !first.contains(&key.as_str()));
    all.extend(others.cloned());
    map(&all)
}

/// The members of an object in their order.
pub(super) fn ordered(raw: &RawValue) -> Result<Vec<(String, Value)>, BodyError> {
    let map: Value = read(raw)?;
    let keys = map.try_iter().map_err(|_| BodyError::Missing("object"))?;
    let member = |key: Value| {
        let value = map.get_item(&key).unwrap_or_default();
        (key.to_string(), value)
    };
    Ok(keys.map(member).collect())
}

fn map(members: &[(String, Value)]) -> Value {
    object(
        members
            .iter()
            .map(|(key, value)| (key.as_str(), value.clone())),
    )
}

fn set(members: &mut Vec<(String, Value)>, key: &str, value: Value) {
    match members.iter_mut().find(|(k, _)| k == key) {
        Some((_, old)) => *old = value,
        None => members.push((key.to_owned(), value)),
    }
}
