//! The arguments of `kv-router check-events`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kv_core::id::{DpRank, WorkerId};

use super::{Checker, MAX_FILE_BYTES, Report, suggested_block_size};
use crate::config::{Config, Layer};
use crate::ingest::engine::Settings;
use crate::ingest::engine::media::Media;

/// Block size where nothing says another one.
const BLOCK_SIZE: u32 = 16;

/// Where events come from and what they are held against.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub struct Command {
    /// Files with one message each, MessagePack or JSON, taken as one stream in this order.
    #[arg(long = "file", value_name = "FILE", num_args = 1.., group = "source")]
    files: Vec<PathBuf>,
    /// Configuration that says the pool's block size, media and families.
    #[arg(long, env = "KV_ROUTER_CONFIG")]
    config: Option<PathBuf>,
    /// Worker of the configuration; its first pool's settings count without.
    #[arg(long, requires = "config")]
    worker: Option<WorkerId>,
    /// Tokens to a block of the index; else the configuration's, else the smallest that files name.
    #[arg(long)]
    block_size: Option<u32>,
    /// Data-parallel rank of messages that name none.
    #[arg(long, default_value_t = 0)]
    rank: DpRank,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

impl Command {
    /// Watches and reports.
    ///
    /// # Errors
    /// When a source can't be read.
    pub fn run(&self, layers: &[Layer]) -> anyhow::Result<Report> {
        let messages = self.files.iter().map(|file| read(file));
        let messages = messages.collect::<anyhow::Result<Vec<_>>>()?;
        let mut settings = self.settings(layers)?;
        if let Some(size) = self.block_size {
            settings.block_size = size;
        } else if self.config.is_none() {
            let messages = messages.iter().map(Vec::as_slice);
            settings.block_size = suggested_block_size(messages).unwrap_or(BLOCK_SIZE);
        }
        let mut checker = Checker::new(settings, self.rank);
        for (file, bytes) in self.files.iter().zip(&messages) {
            checker.message(Some(&file.to_string_lossy()), bytes);
        }
        Ok(checker.report())
    }

    fn settings(&self, layers: &[Layer]) -> anyhow::Result<Settings> {
        let Some(file) = &self.config else {
            return Ok(Settings {
                block_size: BLOCK_SIZE,
                media: Media::default(),
                families: Vec::new(),
                image_token: None,
            });
        };
        let config = Config::load(file, layers).map_err(|errors| {
            anyhow::anyhow!("{} is not a valid configuration\n{errors}", file.display())
        })?;
        let has_worker = |pool: &&crate::config::Pool| {
            self.worker
                .is_none_or(|id| pool.workers.iter().any(|w| w.id == id))
        };
        let pool = config.pools.iter().find(has_worker);
        let pool = pool.with_context(|| {
            format!(
                "no worker {} in {}",
                self.worker.unwrap_or_default(),
                file.display()
            )
        })?;
        Ok(Settings::of(pool))
    }
}

/// A file, up to [`MAX_FILE_BYTES`].
fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    let place = || format!("can't read {}", file.display());
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).with_context(place)?;
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(place)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        anyhow::bail!("{} has more than {MAX_FILE_BYTES} bytes", file.display());
    }
    Ok(bytes)
}
