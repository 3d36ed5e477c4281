//! Waiting for conditions.

use std::fmt::Debug;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Longest wait for anything: only a failing test takes it.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `ask` answers `Ok`; its last error is the failure's message.
///
/// # Panics
/// When it doesn't within [`LIMIT`].
pub async fn until<T, E: Debug>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(value) => return value,
            Err(error) => {
                assert!(
                    start.elapsed() < LIMIT,
                    "waited in vain for {what}: {error:?}"
                );
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
}
