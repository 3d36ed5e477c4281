//! The files Envoy watches: the filter's configuration (ECDS) and each pool's endpoints (EDS).
//! Envoy starts from them without a sidecar.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf, absolute};

use super::{FILTER, SIDECAR_CLUSTER, WASM_TYPE, cluster, quoted};
use crate::config::{Config, Pool};
use crate::state::replace;

/// Key of the filter's configuration that tells its generations apart.
const GENERATION: &str = "generation";

/// Why the files can't be written.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Nowhere to put them.
    #[error("nowhere to put Envoy's files: set state_dir or give --files")]
    NoFolder,
    /// The system refuses.
    #[error("{}: {error}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
}

/// Where the files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// In `dir`, or else in `envoy` in the state folder. Envoy finds them by absolute paths.
    ///
    /// # Errors
    /// Without either folder.
    pub fn new(config: &Config, dir: Option<PathBuf>) -> Result<Self, FilesError> {
        let in_state = || config.state_dir.as_ref().map(|dir| dir.join("envoy"));
        let dir = dir.or_else(in_state).ok_or(FilesError::NoFolder)?;
        let dir = absolute(&dir).map_err(|error| FilesError::Io { file: dir, error })?;
        Ok(Self { dir })
    }

    /// The filter's configuration.
    #[must_use]
    pub fn filter(&self) -> PathBuf {
        self.dir.join("ecds.yaml")
    }

    /// A pool's endpoints.
    #[must_use]
    pub fn endpoints(&self, pool: &str) -> PathBuf {
        self.dir.join(format!("eds-{pool}.yaml"))
    }

    /// Writes all files that differ from what is there.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, config: &Config) -> Result<(), FilesError> {
        self.write_filter(config, self.generation())?;
        for pool in &config.pools {
            self.write_endpoints(&pool.name, &endpoints_of(pool).into_iter().collect())?;
        }
        Ok(())
    }

    /// Writes the filter's configuration with this generation. Another one makes Envoy replace VMs
    /// that have trapped.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write_filter(&self, config: &Config, generation: u64) -> Result<(), FilesError> {
        write(&self.filter(), &filter(config, generation))
    }

    /// The generation in the filter's configuration; 0 without one.
    #[must_use]
    pub fn generation(&self) -> u64 {
        let text = std::fs::read_to_string(self.filter()).unwrap_or_default();
        let after = text.split(GENERATION).nth(1).unwrap_or_default();
        let digits = after.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits.find(|c: char| !c.is_ascii_digit());
        digits
            .get(..end.unwrap_or(digits.len()))
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    }

    /// Writes a pool's endpoints.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write_endpoints(
        &self,
        pool: &str,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> Result<(), FilesError> {
        write(&self.endpoints(pool), &assignment(pool, endpoints))
    }
}

/// The endpoints of a pool, in the order of the configuration.
#[must_use]
pub fn endpoints_of(pool: &Pool) -> Vec<SocketAddr> {
    pool.workers.iter().filter_map(|w| w.endpoint).collect()
}

/// An unchanged file is left alone: Envoy would start the filter's VMs anew for nothing.
fn write(file: &Path, text: &str) -> Result<(), FilesError> {
    if std::fs::read(file).is_ok_and(|before| before == text.as_bytes()) {
        return Ok(());
    }
    replace(file, text.as_bytes(), 0o644).map_err(|error| FilesError::Io {
        file: file.into(),
        error,
    })
}

fn filter(config: &Config, generation: u64) -> String {
    let wasm = absolute(&config.filter_wasm).unwrap_or_else(|_| config.filter_wasm.clone());
    let wasm = quoted(&wasm.to_string_lossy());
    let mut settings = serde_json::json!({ "sidecar_cluster": SIDECAR_CLUSTER });
    // A filter that knows no generations starts from the file as long as none has trapped.
    if generation > 0
        && let Some(settings) = settings.as_object_mut()
    {
        settings.insert(GENERATION.to_owned(), generation.into());
    }
    let settings = quoted(&settings.to_string());
    format!(
        r#"resources:
- "@type": type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig
  name: {FILTER}
  typed_config:
    "@type": {WASM_TYPE}
    config:
      name: {FILTER}
      root_id: {FILTER}
      # A filter that trapped is passed by, and its streams live on.
      fail_open: true
      # Without it a held request would never see its body.
      allow_on_headers_stop_iteration: true
      configuration:
        "@type": type.googleapis.com/google.protobuf.StringValue
        value: {settings}
      vm_config:
        vm_id: {FILTER}
        runtime: envoy.wasm.runtime.v8
        code: {{local: {{filename: {wasm}}}}}
"#
    )
}

fn assignment(pool: &str, endpoints: &BTreeSet<SocketAddr>) -> String {
    let name = quoted(&cluster(pool));
    let endpoint = |a: &SocketAddr| {
        let (ip, port) = (quoted(&a.ip().to_string()), a.port());
        format!(
            "    - endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {port}}}}}}}\n"
        )
    };
    let hosts: String = endpoints.iter().map(endpoint).collect();
    let endpoints = if hosts.is_empty() {
        "  endpoints: []\n".to_owned()
    } else {
        format!("  endpoints:\n  - lb_endpoints:\n{hosts}")
    };
    format!(
        r#"resources:
- "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment
  cluster_name: {name}
{endpoints}"#
    )
}
