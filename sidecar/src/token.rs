//! The token that clients of an HTTP interface show.

use std::sync::Arc;

use axum::http::{HeaderMap, header};

/// A token; it is not shown to anybody.
#[derive(Clone)]
pub struct Token(Arc<str>);

impl Token {
    /// The token that a file has.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text.into())
    }

    /// Whether a request brings it, as `Authorization: Bearer`. Takes the same time wherever a
    /// difference is.
    #[must_use]
    pub fn is_shown(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION);
        let shown = shown.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let Some(shown) = shown else { return false };
        let token = self.0.as_bytes();
        let differ = shown.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
        shown.len() == token.len() && differ == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}
