//! Requests that wait because every worker is busy: when they have to, and who goes next.
//!
//! A pool's queue is made of classes ([`Profile`]). Within a class the order is strict tier, then
//! deadline, then the class's [`Order`], then arrival; between classes deficit round robin shares
//! what there is by quanta of prompt tokens ([`PolicyQueue`]). Requests that only certain workers
//! can take stand in lanes of their own, so that one that waits for a busy worker holds nobody up.
//!
//! Order, classes and limits are Dynamo's.

mod busy;
mod class;
mod key;
mod mail;
#[cfg(all(test, not(target_arch = "wasm32")))]
mod naive;
mod policy;
mod profile;
#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests;

pub use busy::{Capacity, Thresholds};
pub use class::{Class, Full, Limit, Limits, Order, Usage};
pub use mail::{MAILBOXES, Mail, Mailbox, Verdict, mailbox_name};
pub use policy::{Entry, PolicyQueue, Request};
pub use profile::{Bounds, Bucketed, MAX_CLASSES, Profile, ProfileError, Refusing};
