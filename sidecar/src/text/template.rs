//! Chat templates: Jinja as Hugging Face's `apply_chat_template` runs it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Deserialize;

use super::python;

/// Instructions that a rendering may run: a template must not hold a thread.
const FUEL: u64 = 5_000_000;
/// Name of the template that is used unless tools are given.
const DEFAULT: &str = "default";
/// Name of the template that is used where tools are given.
const TOOL_USE: &str = "tool_use";

/// Why a conversation can't be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is none.
    #[error("template {name}: {error}")]
    Parse {
        /// Its name.
        name: String,
        /// What is wrong.
        error: Error,
    },
    /// The template has refused the conversation.
    #[error("the template refuses the conversation: {0}")]
    Refused(String),
    /// It ran out of instructions.
    #[error("the template takes more than {FUEL} steps")]
    TooLong,
    /// It failed.
    #[error("template: {0}")]
    Render(Error),
}

impl TemplateError {
    /// Label for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Parse { .. } => "parse",
            Self::Refused(_) => "refused",
            Self::TooLong => "too_long",
            Self::Render(_) => "render",
        }
    }
}

/// What a template is given.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The messages: a list of maps with `role` and `content`.
    pub messages: Value,
    /// Tools, as the request lists them; undefined without any.
    pub tools: Value,
    /// Documents, as the request lists them; undefined without any.
    pub documents: Value,
    /// Whether the beginning of the assistant's answer follows.
    pub add_generation_prompt: bool,
    /// Whether the last message goes on: what would end it is left out.
    pub continue_final_message: bool,
    /// Further variables: the request's `chat_template_kwargs`.
    pub kwargs: BTreeMap<String, Value>,
}

/// The chat templates of a model.
pub struct Template {
    environment: Environment<'static>,
    has_tool_use: bool,
    /// Whether messages' contents are to stay lists of parts.
    takes_parts: bool,
    specials: BTreeMap<String, Value>,
}

/// `chat_template` of a tokenizer's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Source {
    /// One template.
    One(String),
    /// Several, by name.
    Named(Vec<Named>),
}

/// A named template.
#[derive(Clone, Debug, Deserialize)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// The template.
    pub template: String,
}

impl Template {
    /// The templates of a model, and its special tokens by name (`bos_token` ...).
    ///
    /// # Errors
    /// When one of them can't be parsed.
    pub fn new(source: Source, specials: BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(TemplateError::Render)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(|out, _, value| match value.as_str() {
            Some(text) => Ok(out.write_str(text)?),
            None => Ok(out.write_str(&as_text(value)?)?),
        });
        environment.add_filter("tojson", tojson);
        environment.add_filter("string", |value: &Value| as_text(value));
        environment.add_filter("trim", trim);
        environment.add_test("iterable", is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        let named = match source {
            Source::One(template) => vec![Named {
                name: DEFAULT.into(),
                template,
            }],
            Source::Named(named) => named,
        };
        let mut takes_parts = false;
        for Named { name, template } in named {
            takes_parts |= iterates_contents(&template);
            environment
                .add_template_owned(name.clone(), without_generation_marks(&template))
                .map_err(|error| TemplateError::Parse { name, error })?;
        }
        let specials = specials
            .into_iter()
            .map(|(name, token)| (name, token.into()));
        Ok(Self {
            has_tool_use: environment.get_template(TOOL_USE).is_ok(),
            takes_parts,
            environment,
            specials: specials.collect(),
        })
    }

    /// Whether messages' contents are to stay lists of parts; otherwise their texts are joined.
    #[must_use]
    pub fn takes_parts(&self) -> bool {
        self.takes_parts
    }

    /// The conversation as one text.
    ///
    /// # Errors
    /// When the template refuses or fails.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let has_tools = chat.tools.is_true();
        let name = if has_tools && self.has_tool_use {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(TemplateError::Render)?;
        let mut variables = self.specials.clone();
        variables.extend(chat.kwargs.clone());
        variables.insert("messages".into(), chat.messages.clone());
        variables.insert(
            "add_generation_prompt".into(),
            chat.add_generation_prompt.into(),
        );
        // As in Python: `None` where the request has none, which is not the same as undefined.
        let or_none = |value: &Value| {
            if value.is_undefined() {
                Value::from(())
            } else {
                value.clone()
            }
        };
        variables.insert("tools".into(), or_none(&chat.tools));
        variables.insert("documents".into(), or_none(&chat.documents));
        let text = template.render(Value::from(variables)).map_err(failed)?;
        if chat.continue_final_message {
            return final_message_open(text, &chat.messages);
        }
        Ok(text)
    }
}

/// The text up to the end of the last message's content.
fn final_message_open(text: String, messages: &Value) -> Result<String, TemplateError> {
    let last = messages.len().and_then(|n| n.checked_sub(1));
    let last = last.and_then(|n| messages.get_item_by_index(n).ok());
    let content = last.and_then(|message| message.get_attr("content").ok());
    let content = content.and_then(|content| match content.as_str() {
        Some(text) => Some(text.to_owned()),
        // The last part that is a text.
        None => content
            .try_iter()
            .ok()?
            .filter_map(|part| Some(part.get_attr("text").ok()?.as_str()?.to_owned()))
            .last(),
    });
    let refused = |why: &str| TemplateError::Refused(why.into());
    let content = content.ok_or_else(|| refused("the final message has no text to continue"))?;
    let content = content.trim();
    let at = text.rfind(content).ok_or_else(|| {
        refused("the template changes the final message, which can't be continued")
    })?;
    let mut text = text;
    text.truncate(at + content.len());
    Ok(text)
}

fn failed(error: Error) -> TemplateError {
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::TooLong,
        ErrorKind::InvalidOperation if error.detail().is_some_and(|d| d.starts_with(RAISED)) => {
            let detail = error.detail().unwrap_or_default();
            TemplateError::Refused(detail.trim_start_matches(RAISED).to_owned())
        }
        _ => TemplateError::Render(error),
    }
}

/// Marks errors that a template raises itself.
const RAISED: &str = "raised: ";

#[allow(clippy::needless_pass_by_value)]
fn raise_exception(why: String) -> Result<Value, Error> {
    Err(Error::new(
        ErrorKind::InvalidOperation,
        format!("{RAISED}{why}"),
    ))
}

#[allow(clippy::needless_pass_by_value)]
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Python's other arguments change nothing that templates in use depend on.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let json = python::dumps(value, indent);
    json.map(Value::from_safe_string)
        .map_err(|why| Error::new(ErrorKind::BadSerialization, why))
}

fn as_text(value: &Value) -> Result<String, Error> {
    python::str(value).map_err(|why| Error::new(ErrorKind::InvalidOperation, why))
}

/// Without white space at both ends, as Python has it, or without these characters.
#[allow(clippy::needless_pass_by_value)]
fn trim(value: &Value, chars: Option<String>) -> Result<String, Error> {
    let text = as_text(value)?;
    let trimmed = match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)),
        None => text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\x1c'..='\x1f')),
    };
    Ok(trimmed.to_owned())
}

/// As in Python, where nothing is not iterable.
fn is_iterable(value: &Value) -> bool {
    let is_nothing = value.is_none();
    !is_nothing && value.try_iter().is_ok()
}

#[allow(clippy::needless_pass_by_value)]
fn strftime_now(format: String) -> Result<String, Error> {
    let now = jiff::Zoned::try_from(SystemTime::now());
    let text = now.and_then(|now| jiff::fmt::strtime::format(&format, &now));
    text.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// The template without the marks around the assistant's words, which matter to training alone.
fn without_generation_marks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, tag)) = rest.split_once("{%") {
        let Some((inside, after)) = tag.split_once("%}") else {
            break;
        };
        out.push_str(before);
        let word = inside.trim_matches(['-', '+']).trim();
        if word == "generation" || word == "endgeneration" {
            // An empty comment trims the space around it as the tag would.
            let mark = |c: Option<char>| if c == Some('-') { "-" } else { "" };
            let first = mark(inside.chars().next());
            let last = mark(inside.chars().last());
            out.extend(["{#", first, last, "#}"]);
        } else {
            out.extend(["{%", inside, "%}"]);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Whether a template goes through the parts of messages' contents.
fn iterates_contents(template: &str) -> bool {
    template.split("{%").skip(1).any(|tag| {
        let tag = tag.split("%}").next().unwrap_or_default();
        let tag = tag.trim_start_matches(['-', '+']).trim_start();
        let over = tag.strip_prefix("for").and_then(|t| t.split_once(" in "));
        over.is_some_and(|(_, over)| {
            let over = over.split([' ', '|', '-']).next().unwrap_or_default();
            over == "content"
                || over.ends_with("['content']")
                || over.ends_with("[\"content\"]")
                || over.ends_with(".content")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}\
        {% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn chat(messages: &str) -> Chat {
        Chat {
            messages: serde_json::from_str(messages).unwrap(),
            add_generation_prompt: true,
            ..Chat::default()
        }
    }

    fn template(source: &str) -> Template {
        let specials = [("bos_token".to_owned(), "<s>".to_owned())];
        Template::new(Source::One(source.into()), specials.into()).unwrap()
    }

    #[test]
    fn a_conversation_becomes_a_text() {
        let chat =
            chat(r#"[{"role":"user","content":" hi "},{"role":"assistant","content":"<a & b>"}]"#);
        let text = template(CHATML).render(&chat).unwrap();
        assert_eq!(
            text,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<a & b><|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn tools_are_written_in_their_order() {
        let mut chat = chat(r#"[{"role":"user","content":"x"}]"#);
        chat.tools =
            serde_json::from_str(r#"[{"type":"function","function":{"name":"f","a":1.0}}]"#)
                .unwrap();
        let text = template(CHATML).render(&chat).unwrap();
        assert!(text.starts_with("<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"a\": 1.0}}\n<|im_end|>\n"), "{text}");
    }

    #[test]
    fn the_final_message_is_left_open() {
        let mut chat = chat(
            r#"[{"role":"user","content":"a"},{"role":"assistant","content":"the answer is "}]"#,
        );
        chat.add_generation_prompt = false;
        chat.continue_final_message = true;
        let text = template(CHATML).render(&chat).unwrap();
        assert!(text.ends_with("assistant\nthe answer is"), "{text}");
    }

    #[test]
    fn a_refusal_carries_its_words() {
        let raising = template("{{ raise_exception('roles must alternate') }}");
        match raising.render(&chat("[]")) {
            Err(TemplateError::Refused(why)) => assert_eq!(why, "roles must alternate"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_template_that_goes_on_and_on_is_stopped() {
        let bomb = template(
            "{% for a in range(10000) %}{% for b in range(10000) %}{{ b }}{% endfor %}{% endfor %}",
        );
        assert!(matches!(
            bomb.render(&chat("[]")),
            Err(TemplateError::TooLong)
        ));
    }

    #[test]
    fn marks_for_training_and_specials_and_dates_are_understood() {
        let marked = template(
            "{{ bos_token }}{% for m in messages %}{%- generation -%}\n  {{ m.content }}\n{%- endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}{{ nothing }}",
        );
        let text = marked.render(&chat(r#"[{"content":"x"}]"#)).unwrap();
        assert_eq!(text, "<s>x4");
    }

    #[test]
    fn templates_that_go_through_parts_are_told_apart() {
        assert!(!template(CHATML).takes_parts());
        let parts = "{% for m in messages %}{%- for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}";
        assert!(template(parts).takes_parts());
    }
}
