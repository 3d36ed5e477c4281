//! What a client says about where its request should go, and how long its answer will be.
//!
//! Naming a worker is privileged: it counts only where the route's metadata says
//! `kv: {trust: hints}` or the pool trusts all its clients. The length of an answer is anybody's.

use kv_core::id::{DpRank, WorkerId};
use serde::Deserialize;

use crate::host::{Headers, Host};

/// Headers that name the worker, Dynamo's; the first that can be read counts.
pub const WORKER: [&str; 2] = ["x-dynamo-worker-instance-id", "x-worker-instance-id"];
/// Headers that name its data-parallel rank, Dynamo's.
pub const RANK: [&str; 3] = ["x-dynamo-dp-rank", "x-dp-rank", "x-data-parallel-rank"];
/// The body's key with Dynamo's extensions.
pub const NVEXT: &str = "nvext";

/// Property of the route's metadata that says whom to trust, and the value that trusts the client.
const TRUST: (&[u8], &[u8]) = (b"xds\0route_metadata\0filter_metadata\0kv\0trust", b"hints");

/// Longest value of [`NVEXT`] that is read, in bytes.
pub const MAX_NVEXT: usize = 16 << 10;

/// The worker that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The worker.
    pub worker: WorkerId,
    /// Its data-parallel rank; without it any of the worker's.
    pub rank: Option<DpRank>,
}

/// The parts of [`NVEXT`] that are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Nvext {
    backend_instance_id: Option<WorkerId>,
    decode_worker_id: Option<WorkerId>,
    dp_rank: Option<DpRank>,
    agent_hints: Option<AgentHints>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct AgentHints {
    osl: Option<u32>,
}

impl Nvext {
    /// Reads it; nothing where it makes no sense, which is for the worker to judge.
    #[must_use]
    pub fn parse(json: &[u8]) -> Self {
        serde_json::from_slice(json).unwrap_or_default()
    }

    /// Tokens of the answer that the client expects; 0 where it does not say.
    #[must_use]
    pub fn expected_output(&self) -> u32 {
        self.agent_hints.and_then(|hints| hints.osl).unwrap_or(0)
    }
}

/// The worker that the current request names: by its headers, else in its body.
#[must_use]
pub fn pin(host: &impl Host, nvext: &Nvext) -> Option<Pin> {
    let worker = number(host, &WORKER);
    let worker = worker
        .or(nvext.decode_worker_id)
        .or(nvext.backend_instance_id)?;
    let rank = number(host, &RANK).and_then(|rank| DpRank::try_from(rank).ok());
    Some(Pin {
        worker,
        rank: rank.or(nvext.dp_rank),
    })
}

/// Whether the current request's route lets its clients name workers.
#[must_use]
pub fn route_trusts(host: &impl Host) -> bool {
    let (path, value) = TRUST;
    host.property(path).as_deref() == Some(value)
}

/// The first header that is a decimal number.
fn number(host: &impl Host, names: &[&str]) -> Option<u64> {
    names.iter().find_map(|name| {
        let value = host.header(Headers::Request, name)?;
        std::str::from_utf8(&value).ok()?.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn headers_name_the_worker_before_the_body_does() {
        let host = Fake::default();
        let nvext = Nvext::parse(br#"{"backend_instance_id": 7, "dp_rank": 2, "other": [1]}"#);
        let pin = || pin(&host, &nvext).map(|pin| (pin.worker, pin.rank));
        assert_eq!(pin(), Some((7, Some(2))));
        host.client_header("x-worker-instance-id", b" 9 ");
        assert_eq!(pin(), Some((9, Some(2))));
        host.client_header("x-dynamo-worker-instance-id", b"18446744073709551615");
        host.client_header("x-data-parallel-rank", b"1");
        assert_eq!(pin(), Some((u64::MAX, Some(1))));
        host.client_header("x-dynamo-worker-instance-id", b"-1");
        assert_eq!(pin(), Some((9, Some(1))));
    }

    #[test]
    fn what_makes_no_sense_says_nothing() {
        let host = Fake::default();
        for json in [
            &b"7"[..],
            b"",
            b"{\"dp_rank\":1}",
            b"{\"backend_instance_id\":\"x\"}",
        ] {
            assert_eq!(pin(&host, &Nvext::parse(json)), None);
        }
        let osl = |json: &[u8]| Nvext::parse(json).expected_output();
        assert_eq!(
            osl(br#"{"agent_hints": {"osl": 300, "priority": -1}}"#),
            300
        );
        assert_eq!(osl(br#"{"agent_hints": {"osl": null}}"#), 0);
    }

    #[test]
    fn decode_worker_wins_over_backend_instance() {
        let host = Fake::default();
        let nvext = Nvext::parse(br#"{"backend_instance_id": 7, "decode_worker_id": 8}"#);
        assert_eq!(pin(&host, &nvext).unwrap().worker, 8);
    }
}
