//! How a worker that posts shows who it is.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two readings of a token's file.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Most bytes of a token.
const TOKEN_BYTES: u64 = 4096;

/// What is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// File with its token.
    pub token_file: Option<PathBuf>,
    /// Whether who posts from this machine needs none.
    pub trusts_loopback: bool,
}

/// The same, with the token as last read.
#[derive(Debug)]
pub(super) struct Proof {
    credentials: Credentials,
    token: Mutex<Token>,
}

#[derive(Debug, Default)]
struct Token {
    text: Option<String>,
    read_at: Option<Instant>,
}

impl Proof {
    pub(super) fn new(credentials: Credentials) -> Self {
        let proof = Self {
            credentials,
            token: Mutex::default(),
        };
        if let Some(file) = &proof.credentials.token_file {
            proof.read(file);
        }
        proof
    }

    /// Whether this is the worker's token, or none is needed from there.
    pub(super) async fn accepts(self: &Arc<Self>, token: Option<&str>, from: IpAddr) -> bool {
        if self.credentials.trusts_loopback && from.to_canonical().is_loopback() {
            return true;
        }
        let (Some(token), Some(file)) = (token, &self.credentials.token_file) else {
            return false;
        };
        if self.has(token) {
            return true;
        }
        // It may have been replaced.
        if self.may_read() {
            let (proof, file) = (Arc::clone(self), file.clone());
            let reading = tokio::task::spawn_blocking(move || proof.read(&file));
            // Reading neither panics nor is it broken off.
            let _ = reading.await;
        }
        self.has(token)
    }

    fn has(&self, token: &str) -> bool {
        let own = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        own.text.as_deref().is_some_and(|own| is_equal(own, token))
    }

    fn may_read(&self) -> bool {
        let now = Instant::now();
        let mut own = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = own.read_at.is_none_or(|at| now >= at + READ_AGAIN);
        if is_due {
            own.read_at = Some(now);
        }
        is_due
    }

    fn read(&self, file: &Path) {
        match read_token(file) {
            Ok(text) => {
                let mut own = self.token.lock().unwrap_or_else(PoisonError::into_inner);
                own.text = Some(text);
            }
            Err(error) => tracing::error!(%error, "can't read a worker's token"),
        }
    }
}

/// Takes as long for any two texts of a length.
fn is_equal(a: &str, b: &str) -> bool {
    let differences = a.bytes().zip(b.bytes()).fold(0, |d, (a, b)| d | (a ^ b));
    a.len() == b.len() && differences == 0
}

fn read_token(file: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(file)?
        .take(TOKEN_BYTES)
        .read_to_string(&mut text)?;
    let text = text.trim().to_owned();
    if text.is_empty() {
        let why = format!("{} is empty", file.display());
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
    }
    Ok(text)
}
