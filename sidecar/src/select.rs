//! The select service: Dynamo's HTTP interface to decisions, on a port of its own.
//!
//! Paths, bodies and messages are those of Dynamo 1.6.1's `python -m dynamo.select_service`. It
//! decides by the policy, the index and the load of which Envoy's filters have their copies, and
//! what is reserved here is load that they see. Workers may register to be selected here alone:
//! Envoy sends them nothing.

mod answer;
mod ask;
mod catalog;
mod choice;
mod error;
mod prompt;
mod record;
mod request;
mod reservations;
mod routes;
mod workers;

pub use ask::{Ask, Booking, Served, Stage};
pub use catalog::Catalog;
pub use choice::{Choice, Constraints, Question, Then, choose};
pub use error::SelectError;
pub use prompt::Hashed;
pub use reservations::{Pending, Reservations};
pub use routes::{Face, router};
