//! Which requests are held until their body has been read.
//!
//! Only what surely is a generation request with a bounded JSON body: anything held that never
//! ends (an upgrade, a bidirectional stream) would hang.

use kv_core::surface::Surface;

use crate::header_map::HeaderMap;
use crate::reason::Reason;

/// Path of the list of models.
const MODELS: &[u8] = b"/v1/models";

/// Whether to hold a request whose body is still to come: as what.
///
/// # Errors
/// The reason for not holding it.
pub fn judge(headers: &HeaderMap, body_limit: u64) -> Result<Surface, Reason> {
    let header = |name| headers.get(name);
    let surface = Surface::of(path(headers)).ok_or(Reason::Passed)?;
    if header(":method") != Some(b"POST")
        || !header("content-type").is_some_and(is_json)
        || header("upgrade").is_some()
        || header("connection").is_some_and(asks_for_upgrade)
    {
        return Err(Reason::Passed);
    }
    if header("content-encoding").is_some() {
        return Err(Reason::Compressed);
    }
    if let Some(length) = header("content-length") {
        let length = std::str::from_utf8(length).ok();
        match length.and_then(|length| length.parse::<u64>().ok()) {
            None => return Err(Reason::Passed),
            Some(length) if length > body_limit => return Err(Reason::TooLong),
            Some(_) => {}
        }
    }
    Ok(surface)
}

/// Whether the current request, which has no body, asks for the list of models.
pub fn asks_for_models(headers: &HeaderMap) -> bool {
    headers.get(":method") == Some(b"GET") && path(headers) == MODELS
}

/// Path without query and fragment.
fn path(headers: &HeaderMap) -> &[u8] {
    let path = headers.get(":path").unwrap_or_default();
    let mut parts = path.split(|b| matches!(b, b'?' | b'#'));
    parts.next().unwrap_or_default()
}

/// `application/json`, possibly with parameters.
fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|b| *b == b';').next();
    let essence = essence.unwrap_or_default().trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
}

fn asks_for_upgrade(connection: &[u8]) -> bool {
    let mut options = connection.split(|b| *b == b',');
    options.any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

#[cfg(test)]
mod tests {
    use kv_core::surface::Surface;

    use super::judge;
    use crate::fake::Fake;
    use crate::host::{Headers, Host as _};
    use crate::reason::Reason;

    const LIMIT: u64 = 1000;

    /// The verdict on a well-formed generation request, changed by these headers; an empty value
    /// removes one.
    fn verdict(changes: &[(&str, &[u8])]) -> Result<Surface, Reason> {
        let host = Fake::default();
        for (name, value) in [
            (":method", &b"POST"[..]),
            (":path", b"/v1/completions"),
            ("content-type", b"application/json"),
            ("content-length", b"1000"),
        ]
        .iter()
        .chain(changes)
        {
            host.client_header(name, value);
        }
        judge(&host.headers(Headers::Request).unwrap(), LIMIT)
    }

    #[test]
    fn generation_requests_are_held() {
        let plain = Ok(Surface::Completions);
        let cases: [(&str, &[u8]); 6] = [
            ("content-type", b"application/json; charset=utf-8"),
            ("content-type", b"Application/JSON ;charset=utf-8"),
            (":path", b"/v1/completions?api-version=1"),
            ("content-length", b""),
            ("connection", b"keep-alive"),
            ("expect", b"100-continue"),
        ];
        for case in cases {
            assert_eq!(verdict(&[case]), plain, "{case:?}");
        }
        let chat = verdict(&[(":path", b"/v1/chat/completions")]);
        assert_eq!(chat, Ok(Surface::Chat));
    }

    #[test]
    fn everything_else_passes() {
        let cases: [(&str, &[u8]); 15] = [
            (":method", b"GET"),
            (":method", b"CONNECT"),
            (":method", b"\xff"),
            (":path", b"/v1/models"),
            (":path", b"/v1/completions/"),
            (":path", b"\xff\xfe"),
            (":path", b""),
            ("content-type", b""),
            ("content-type", b"application/grpc"),
            ("content-type", b"multipart/form-data; boundary=x"),
            ("content-type", b"application/json\xff"),
            ("upgrade", b"websocket"),
            ("connection", b"keep-alive, Upgrade"),
            ("content-length", b"\xff"),
            ("content-length", b"-1"),
        ];
        for case in cases {
            assert_eq!(verdict(&[case]), Err(Reason::Passed), "{case:?}");
        }
        assert_eq!(
            verdict(&[("content-length", b"1001")]),
            Err(Reason::TooLong)
        );
        let huge = b"99999999999999999999999";
        assert_eq!(verdict(&[("content-length", huge)]), Err(Reason::Passed));
    }

    #[test]
    fn compressed_bodies_pass_and_are_told_apart() {
        for encoding in [&b"gzip"[..], b"\xff"] {
            let verdict = verdict(&[("content-encoding", encoding)]);
            assert_eq!(verdict, Err(Reason::Compressed));
        }
    }
}
