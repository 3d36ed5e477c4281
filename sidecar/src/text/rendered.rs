//! A prompt as its chat template writes it.

use kv_core::text::{Ask, Extent, Refusal, Wanted};

use super::blocks::Blockwise;
use super::body::Prompt;
use super::cached::Encoded;
use super::chat::MEDIA;
use super::cut::Cuts;
use super::model::Model;
use super::vision::Image;

/// Bytes of text to a token, where nothing better is known.
const BYTES_PER_TOKEN: usize = 4;

/// The text that is tokenized for a prompt.
pub(super) struct Rendered {
    /// The text: of a prompt with media that nothing is known of, what stands before them.
    pub(super) text: String,
    /// Whether the tokenizer's own special tokens go around it.
    special: bool,
    /// Whether it goes to the prompt's end, or to the first such media.
    extent: Extent,
    /// The images that the model sees in it, where there are any.
    images: Option<Vec<Image>>,
}

impl Rendered {
    /// The text of the prompt in a body.
    pub(super) fn new(model: &Model, ask: &Ask<'_>) -> Result<Self, Refusal> {
        let prompt = Prompt::parse(ask.surface, ask.body).map_err(|error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not read");
            Refusal::Malformed
        })?;
        let mut chat = match prompt {
            Prompt::Text { text, special } => {
                return Ok(Self {
                    text,
                    special,
                    extent: Extent::Whole,
                    images: None,
                });
            }
            Prompt::Chat(chat) => chat,
        };
        let template = model.template.as_ref().ok_or(Refusal::NoTokenizer)?;
        let (special, has_media) = (chat.special(), chat.has_media());
        let mut images = None;
        let mut is_clear = !has_media;
        if has_media && model.vision.is_some() && template.takes_parts() {
            let (known, is_all) = chat.images();
            is_clear = is_all;
            images = Some(known);
            chat = chat.seeing();
        }
        let chat = chat.into_chat(template.takes_parts());
        let mut text = template.render(&chat).map_err(|error| {
            tracing::debug!(%error, pool = ask.pool, "prompt not rendered");
            Refusal::Template
        })?;
        let mut extent = Extent::Whole;
        if !is_clear {
            before_media(&mut text, model.tokens.encoder().cuts());
            extent = Extent::Media;
        }
        Ok(Self {
            text,
            special,
            extent,
            images,
        })
    }

    /// The blocks of its ids, or of those of its beginning.
    pub(super) fn blocks(
        &self,
        model: &Model,
        encoded: Encoded,
        ask: &Ask<'_>,
        wanted: &Wanted<'_>,
    ) -> Blockwise {
        let mut extent = self.extent;
        if !encoded.complete {
            extent = Extent::Deadline;
        }
        let estimated = self.estimate(&encoded, ask.body.len(), extent);
        let mut ids = encoded.ids;
        if let Some((vision, images)) = model.vision.as_ref().zip(self.images.as_ref())
            && !vision.expand(&mut ids, images, extent == Extent::Whole)
        {
            extent = Extent::Media;
        }
        if self.special {
            let (before, after) = model.tokens.encoder().around();
            ids.splice(..0, before.iter().copied());
            if extent == Extent::Whole {
                ids.extend_from_slice(after);
            }
        }
        let tokens = estimated.max(ids.len());
        let wanted = Wanted {
            // What stands for an image is none of the engine's tokens.
            ids: wanted.ids && self.images.is_none(),
            ..wanted.clone()
        };
        Blockwise::new(ask, &wanted, tokens, extent, &ids)
    }

    /// Tokens of the prompt, by what is known of its beginning where it was not read to its end.
    fn estimate(&self, encoded: &Encoded, body: usize, extent: Extent) -> usize {
        let (ids, text) = (encoded.ids.len(), self.text.len());
        match extent {
            Extent::Whole => ids,
            Extent::Deadline => text / BYTES_PER_TOKEN,
            // What an image takes can't be known.
            Extent::Media => ids + body.saturating_sub(text).min(4096) / BYTES_PER_TOKEN,
        }
    }
}

/// Cuts a text before what stands for an image, where its beginning has the ids that it has in the
/// engine's prompt, whatever stands for the image there.
fn before_media(text: &mut String, cuts: &Cuts) {
    let end = text.find(MEDIA).unwrap_or(text.len());
    let cut = text.get(..end).and_then(|text| cuts.last(text));
    text.truncate(cut.map_or(0, |cut| cut.at));
}
