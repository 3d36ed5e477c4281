//! Images in prompts: the engine's placeholder tokens, and what stands for them in hashes.
//!
//! A chat template writes one placeholder token for an image; the engine makes as many of it as the
//! image has patches. In hashes each of them is the id that stands for the image, as where events of
//! engines are rewritten ([`crate::ingest::engine::pad`]). So an image counts whose size is known, from the
//! bytes that are sent along, and whose name in the engine's cache is, from `uuid` beside them.
//!
//! Known is the family of Qwen2-VL: models with its image processor, which resizes an image to
//! multiples of its patches within bounds of its pixels.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::model::{ModelError, json};
use crate::ingest::engine::{mm_hash, pad};

/// Image processors that count as Qwen2-VL's does.
const PROCESSORS: [&str; 3] = [
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
];
/// Characters of an embedded image that are looked at: its size stands near the beginning.
const HEAD: usize = 128 << 10;
/// An image with longer sides in relation to each other is refused.
const MAX_RATIO: f64 = 200.0;

/// An image of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Hash of its name in the engine's cache.
    hash: u64,
    /// Width and height in pixels.
    size: (usize, usize),
}

impl Image {
    /// An image that is sent along as a `data:` URL, with its name; `None` where its size can't be
    /// told.
    #[must_use]
    pub fn new(url: &str, name: &str) -> Option<Self> {
        let (_, data) = url.strip_prefix("data:image/")?.split_once(";base64,")?;
        // Whole groups of four characters stand for whole bytes.
        let head = data.get(..HEAD.min(data.len() / 4 * 4))?;
        let bytes = STANDARD.decode(head).ok()?;
        let size = imagesize::blob_size(&bytes).ok()?;
        Some(Self {
            hash: mm_hash(name)?,
            size: (size.width, size.height),
        })
    }
}

/// How a model sees images.
#[derive(Clone, Debug, PartialEq)]
pub struct Vision {
    /// The placeholder.
    token: u32,
    /// Pixels to a side of what one placeholder stands for.
    factor: f64,
    least_pixels: f64,
    most_pixels: f64,
}

/// What is needed of `preprocessor_config.json`.
#[derive(Debug, Deserialize)]
struct Settings {
    #[serde(default)]
    image_processor_type: String,
    #[serde(default = "patch_size")]
    patch_size: u32,
    #[serde(default = "merge_size")]
    merge_size: u32,
    min_pixels: Option<u32>,
    max_pixels: Option<u32>,
    size: Option<Size>,
}

#[derive(Debug, Deserialize)]
struct Size {
    shortest_edge: Option<u32>,
    longest_edge: Option<u32>,
}

fn patch_size() -> u32 {
    14
}

fn merge_size() -> u32 {
    2
}

impl Vision {
    /// The eyes of a model in a folder whose placeholder is this token; `None` for one of another
    /// family.
    ///
    /// # Errors
    /// When the file is broken.
    pub fn load(folder: &Path, token: u32) -> Result<Option<Self>, ModelError> {
        let settings: Option<Settings> = json(&folder.join("preprocessor_config.json"))?;
        Ok(settings.and_then(|settings| Self::new(&settings, token)))
    }

    fn new(settings: &Settings, token: u32) -> Option<Self> {
        let is_known = PROCESSORS.contains(&settings.image_processor_type.as_str());
        let edges = settings.size.as_ref();
        let least = settings.min_pixels;
        let most = settings.max_pixels;
        let least = least.or_else(|| edges?.shortest_edge).unwrap_or(56 * 56);
        let most = most
            .or_else(|| edges?.longest_edge)
            .unwrap_or(28 * 28 * 1280);
        let factor = settings.patch_size * settings.merge_size;
        (is_known && factor > 0).then_some(Self {
            token,
            factor: factor.into(),
            least_pixels: least.into(),
            most_pixels: most.into(),
        })
    }

    /// Placeholders of an image; `None` where the engine refuses it.
    #[must_use]
    #[allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]
    pub fn placeholders(&self, image: &Image) -> Option<usize> {
        let (width, height) = (image.size.0 as f64, image.size.1 as f64);
        let (least, most) = (width.min(height), width.max(height));
        if least < 1.0 || most / least > MAX_RATIO {
            return None;
        }
        let sides = |scale: f64, round: fn(f64) -> f64| {
            [height, width].map(|side| round(side * scale / self.factor))
        };
        // As the processor computes them, operation by operation: they decide at the edge.
        let plain = sides(1.0, f64::round_ties_even);
        let pixels = plain[0] * self.factor * (plain[1] * self.factor);
        let sides = if pixels > self.most_pixels {
            let beta = (height * width / self.most_pixels).sqrt();
            [height, width].map(|side| (side / beta / self.factor).floor().max(1.0))
        } else if pixels < self.least_pixels {
            let beta = (self.least_pixels / (height * width)).sqrt();
            sides(beta, f64::ceil)
        } else {
            plain
        };
        Some((sides[0] * sides[1]) as usize)
    }

    /// The ids as they count in hashes. `images` are those before the first one of which nothing is
    /// known; `is_whole` where there is no such.
    ///
    /// Returns whether the ids go to the end: they end before a placeholder of which it is not clear
    /// what it stands for.
    pub fn expand(&self, ids: &mut Vec<u32>, images: &[Image], is_whole: bool) -> bool {
        let placed = ids.iter().filter(|id| **id == self.token).count();
        // A text may hold the placeholder too.
        let is_clear = placed == images.len() || (!is_whole && placed < images.len());
        let mut images = images.iter();
        let mut expanded = Vec::with_capacity(ids.len());
        let mut complete = true;
        for id in ids.iter() {
            if *id != self.token {
                expanded.push(*id);
                continue;
            }
            let image = images.next().filter(|_| is_clear);
            let count = image.and_then(|image| Some((image, self.placeholders(image)?)));
            let Some((image, count)) = count else {
                complete = false;
                break;
            };
            expanded.extend(std::iter::repeat_n(pad(image.hash), count));
        }
        *ids = expanded;
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: u32 = 9;

    fn vision(settings: &str) -> Option<Vision> {
        Vision::new(&serde_json::from_str(settings).unwrap(), TOKEN)
    }

    fn qwen() -> Vision {
        vision(r#"{"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 12845056}"#)
            .unwrap()
    }

    fn image(width: usize, height: usize) -> Image {
        Image {
            hash: mm_hash("img-1").unwrap(),
            size: (width, height),
        }
    }

    #[test]
    fn placeholders_are_as_many_as_the_processor_makes() {
        // By `smart_resize` of the `transformers` library.
        let cases = [
            (1, 1, 4),
            (56, 56, 4),
            (640, 480, 391),
            (1024, 768, 999),
            (42, 70, 4),
            (14, 1400, 20),
            (5000, 4000, 16302),
            (10_000, 50, 714),
        ];
        for (width, height, count) in cases {
            let placed = qwen().placeholders(&image(width, height));
            assert_eq!(placed, Some(count), "{width}x{height}");
        }
        assert_eq!(qwen().placeholders(&image(10_001, 50)), None);
        assert_eq!(qwen().placeholders(&image(0, 50)), None);
        let newer = r#"{"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16,
            "size": {"shortest_edge": 65536, "longest_edge": 16777216}}"#;
        let newer = vision(newer).unwrap();
        assert_eq!(newer.placeholders(&image(640, 480)), Some(300));
        assert_eq!(newer.placeholders(&image(32, 32)), Some(64));
        assert_eq!(
            vision(r#"{"image_processor_type": "CLIPImageProcessor"}"#),
            None
        );
    }

    #[test]
    fn an_image_is_told_by_its_bytes_and_its_name() {
        // The head of a PNG of 640 by 480 pixels.
        let png = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAoAAAAHgCAYAAAA=";
        assert_eq!(Image::new(png, "img-1"), Some(image(640, 480)));
        assert_eq!(Image::new(png, ""), None);
        for other in [
            "https://example.org/a.png",
            "data:image/png;base64,AAAA",
            "data:image/png;base64,\u{e9}\u{e9}",
            "data:image/png,x",
            "",
        ] {
            assert_eq!(Image::new(other, "img-1"), None, "{other}");
        }
    }

    #[test]
    fn ids_end_where_it_is_not_clear_what_stands_there() {
        let (vision, small) = (qwen(), image(28, 56));
        let stands = pad(small.hash);
        let expanded = |ids: &[u32], images: &[Image], is_whole| {
            let mut ids = ids.to_vec();
            let complete = vision.expand(&mut ids, images, is_whole);
            (ids, complete)
        };
        let count = vision.placeholders(&small).unwrap();
        let shown = [&[1][..], &vec![stands; count], &[2]].concat();
        let one = std::slice::from_ref(&small);
        assert_eq!(expanded(&[1, TOKEN, 2], one, true), (shown, true));
        // The text has the placeholder, or not all images are placed.
        assert_eq!(expanded(&[1, TOKEN, 2], &[], true), (vec![1], false));
        assert_eq!(expanded(&[1, TOKEN, TOKEN], one, true), (vec![1], false));
        assert_eq!(expanded(&[1, 2], one, true), (vec![1, 2], true));
        assert_eq!(expanded(&[1, 2], one, false), (vec![1, 2], true));
    }
}
