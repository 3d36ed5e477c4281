//! Tells Envoy KV Router what an engine of your own has in its KV cache.
//!
//! An engine posts numbered batches of [`Event`]s to the sidecar's `POST /v1/events`. A
//! [`Publisher`] does that in the background: it numbers them, sends again what got lost and, where
//! it has that no more, begins anew with the engine's whole cache.
//!
//! ```no_run
//! use kv_publisher::{Event, Publisher, Settings};
//!
//! # async fn engine() -> Result<(), kv_publisher::SettingsError> {
//! let settings = Settings::new("http://127.0.0.1:9100/v1/events", 7);
//! // What is cached, for whenever the router has lost it.
//! let publisher = Publisher::start(settings, || Vec::new())?;
//! publisher.publish(vec![Event::stored(vec![501], None, (0..16).collect(), 16)]);
//! publisher.publish(vec![Event::removed(vec![501])]);
//! # publisher.flush().await;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod event;
mod publisher;

pub use event::{Event, Post};
pub use publisher::{Publisher, Settings, SettingsError, Totals};
