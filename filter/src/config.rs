//! The plugin configuration: only how to reach the sidecar. Everything else comes from it.

use serde::Deserialize;

/// The plugin configuration, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Envoy cluster of the sidecar's stream, 1 to 100 bytes.
    pub sidecar_cluster: String,
    /// Period of election, reconnection and staleness checks, 5 to 1,000 milliseconds.
    pub tick_ms: u32,
    /// After how long a silent bridge is replaced, at least three ticks and at most 60,000
    /// milliseconds.
    pub lease_ms: u32,
    /// Any number. The sidecar writes another one when a VM has trapped: Envoy replaces trapped VMs
    /// when the plugin configuration changes, and leaves the others as they are.
    pub generation: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sidecar_cluster: "kv_router_sidecar".to_owned(),
            tick_ms: 50,
            lease_ms: 300,
            generation: 0,
        }
    }
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// Says everything that is wrong with it.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let config: Self = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        let mut faults = Vec::new();
        let cluster = config.sidecar_cluster.len();
        if !(1..=100).contains(&cluster) {
            faults.push(format!(
                "sidecar_cluster has {cluster} bytes, allowed are 1 to 100"
            ));
        }
        if !(5..=1_000).contains(&config.tick_ms) {
            faults.push(format!(
                "tick_ms is {}, allowed are 5 to 1000",
                config.tick_ms
            ));
        }
        let least = config.tick_ms.saturating_mul(3);
        if !(least..=60_000).contains(&config.lease_ms) {
            faults.push(format!(
                "lease_ms is {}, allowed are {least} (three ticks) to 60000",
                config.lease_ms
            ));
        }
        if faults.is_empty() {
            Ok(config)
        } else {
            Err(faults.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    #[test]
    fn an_empty_object_is_the_default() {
        assert_eq!(Config::parse(b"{}"), Ok(Config::default()));
    }

    #[test]
    fn every_fault_is_named() {
        let fault = Config::parse(br#"{"sidecar_cluster": "", "tick_ms": 2, "lease_ms": 70000}"#);
        let fault = fault.unwrap_err();
        for part in ["sidecar_cluster", "tick_ms is 2", "lease_ms is 70000"] {
            assert!(fault.contains(part), "{fault}");
        }
        assert!(Config::parse(b"").is_err());
        assert!(
            Config::parse(br#"{"tick": 3}"#)
                .unwrap_err()
                .contains("tick")
        );
    }
}
