//! Tells when the configuration file has changed, however it is replaced.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Changes within this time are one change.
const SETTLE: Duration = Duration::from_millis(100);

/// Watches a file.
///
/// The folders are watched, not the file: editors and Kubernetes replace it by renaming, Kubernetes
/// a symbolic link in its folder. Whether the text differs is decided by reading it.
#[derive(Debug)]
pub struct Watch {
    file: PathBuf,
    text: Option<Vec<u8>>,
    events: mpsc::Receiver<()>,
    /// When an event that has come is looked into: waiting may be broken off, as often as may be.
    look_at: Option<Instant>,
    _watcher: RecommendedWatcher,
}

impl Watch {
    /// Starts to watch.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new(file: &Path) -> notify::Result<Self> {
        let (changed, events) = mpsc::channel(1);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                let is_read = event.is_ok_and(|e| matches!(e.kind, EventKind::Access(_)));
                if !is_read {
                    // Full means that a change is pending already.
                    let _ = changed.try_send(());
                }
            })?;
        let mut folders = vec![folder(file)];
        if let Ok(real) = file.canonicalize() {
            folders.push(folder(&real));
        }
        folders.dedup();
        for folder in &folders {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
        }
        Ok(Self {
            text: std::fs::read(file).ok(),
            file: file.into(),
            events,
            look_at: None,
            _watcher: watcher,
        })
    }

    /// Waits until the text is another; `None` if watching has failed for good. Breaking the wait
    /// off loses no change.
    pub async fn changed(&mut self) -> Option<()> {
        loop {
            let at = match self.look_at {
                Some(at) => at,
                None => {
                    self.events.recv().await?;
                    *self.look_at.insert(Instant::now() + SETTLE)
                }
            };
            tokio::time::sleep_until(at).await;
            self.look_at = None;
            // What came meanwhile is seen by reading below.
            let _ = self.events.try_recv();
            // A file that is away for a moment is being replaced.
            let text = std::fs::read(&self.file).ok();
            if text.is_some() && text != self.text {
                self.text = text;
                return Some(());
            }
        }
    }
}

fn folder(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        _ => PathBuf::from("."),
    }
}
