//! Real parts for tests: a running sidecar, a NATS server, a bridge. All on loopback, in folders of
//! their own, stopped on drop.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod engine;
pub(crate) mod proxy;
pub(crate) mod service;
pub(crate) mod vm;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use kv_core::head::Head;
use kv_core::key;
use kv_core::loads::Loads;
use kv_core::report::Report;
use kv_core::table::Table;
use kv_core::wire::{self, Ack, Batch, METHOD, SERVICE, Subscribe, Up};
use kv_router::bridge::Raw;
use kv_router::config::Config;
use kv_router::serve::{self, Source};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status, Streaming};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Polls until there is a value.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// A port of loopback that is free at the moment.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A tool: named by a variable, or fetched into the workspace.
pub(crate) fn tool(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../.tools/bin")
        .join(name);
    assert!(
        path.exists(),
        "no {name}: set {variable} or put one at .tools/bin"
    );
    path
}

/// A NATS server.
pub(crate) struct Nats {
    process: Child,
    folder: TempDir,
    pub(crate) port: u16,
}

impl Nats {
    pub(crate) async fn start() -> Self {
        Self::start_on(free_port()).await
    }

    pub(crate) async fn start_on(port: u16) -> Self {
        let folder = TempDir::new().unwrap();
        let process = Command::new(tool("NATS_SERVER", "nats-server"))
            .args(["-a", "127.0.0.1", "-p", &port.to_string()])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let listens = async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .ok()
        };
        eventually("nats-server listens", listens).await;
        Self {
            process,
            folder,
            port,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _already_dead = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// A running sidecar.
pub(crate) struct Sidecar {
    pub(crate) folder: TempDir,
    admin: u16,
    cancel: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Sidecar {
    /// Starts one whose configuration ends with `yaml`.
    pub(crate) async fn start(yaml: &str) -> Self {
        Self::start_in(TempDir::new().unwrap(), yaml).await
    }

    /// Starts one in a folder that another may have left.
    pub(crate) async fn start_in(folder: TempDir, yaml: &str) -> Self {
        let admin = free_port();
        let mut sidecar = Self {
            folder,
            admin,
            cancel: CancellationToken::new(),
            task: None,
        };
        sidecar.configure(yaml);
        let file = sidecar.file();
        let config = Config::load(&file, &[]).unwrap_or_else(|e| panic!("{e}"));
        let source = Source {
            file,
            layers: Vec::new(),
            envoy_files: None,
        };
        let cancel = sidecar.cancel.clone();
        sidecar.task = Some(tokio::spawn(serve::run(config, source, cancel)));
        let answers = async || sidecar.get("/healthz").await.ok();
        eventually("the sidecar answers", answers).await;
        sidecar
    }

    /// Port of its HTTP API.
    pub(crate) fn admin_port(&self) -> u16 {
        self.admin
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("config.yaml")
    }

    /// Replaces the configuration file as Kubernetes and editors do.
    pub(crate) fn configure(&self, yaml: &str) {
        let at = |name: &str| self.folder.path().join(name).display().to_string();
        let text = format!(
            "admin: 127.0.0.1:{}\nenvoy_admin: 127.0.0.1:1\nsocket: {}\nstate_dir: {}\n{yaml}",
            self.admin,
            at("bridge.sock"),
            at("state"),
        );
        let beside = self.folder.path().join("config.new");
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(beside, self.file()).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("bridge.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The body of a path, whatever its status.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<String> {
        self.request("GET", path, "").await
    }

    pub(crate) async fn json(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.get(path).await.unwrap()).unwrap()
    }

    pub(crate) async fn explain(&self, question: &serde_json::Value) -> serde_json::Value {
        let body = question.to_string();
        let answer = self.request("POST", "/v1/explain", &body).await.unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    async fn request(&self, method: &str, path: &str, body: &str) -> anyhow::Result<String> {
        use http_body_util::{BodyExt as _, Full};
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.admin)).await?;
        let (mut send, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "sidecar")
            .body(Full::new(Bytes::from(body.to_owned())))?;
        let answer = send.send_request(request).await?;
        let bytes = answer.into_body().collect().await?.to_bytes();
        drop(send);
        connection.await??;
        Ok(String::from_utf8(bytes.to_vec())?)
    }

    /// Waits until `/v1/index` satisfies a condition.
    pub(crate) async fn index(
        &self,
        what: &str,
        is_so: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let look = async || Some(self.json("/v1/index").await).filter(|i| is_so(i));
        eventually(what, look).await
    }

    /// Ends it in order and hands its folder on.
    pub(crate) async fn stop(mut self) -> TempDir {
        self.cancel.cancel();
        if let Some(task) = self.task.take() {
            task.await.unwrap().unwrap();
        }
        std::mem::replace(&mut self.folder, TempDir::new().unwrap())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// A write as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wrote {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl Wrote {
    pub(crate) fn is_page(&self) -> bool {
        matches!(self.key.as_slice(), [_, b'p', ..])
    }

    pub(crate) fn head(&self) -> Option<Head> {
        (self.key == key::HEAD).then(|| Head::decode(&self.value).unwrap())
    }

    pub(crate) fn loads(&self) -> Option<Loads> {
        (self.key == key::LOADS).then(|| Loads::decode(&self.value).unwrap())
    }

    pub(crate) fn table(&self) -> Option<Table> {
        (self.key == key::TABLE).then(|| Table::decode(&self.value).unwrap())
    }
}

/// The other end of the stream, as the filter's bridge has it.
pub(crate) struct Bridge {
    up: mpsc::Sender<Bytes>,
    down: Streaming<Bytes>,
    seq: u64,
    version: u8,
    beat: u64,
}

pub(crate) fn subscribe(process: u64, term: u64) -> Subscribe {
    Subscribe {
        format: key::FORMAT,
        process,
        vm_id: "kv_router".into(),
        term,
        epoch: None,
        level: 0,
    }
}

impl Bridge {
    /// Opens a stream with a subscription.
    pub(crate) async fn open(socket: &Path, who: Subscribe) -> Result<Self, Status> {
        Self::open_with(socket, wire::encode(&Up::Subscribe(who)).into()).await
    }

    /// Opens a stream with any first message.
    pub(crate) async fn open_with(socket: &Path, first: Bytes) -> Result<Self, Status> {
        let mut grpc = tonic::client::Grpc::new(channel(socket).await);
        grpc.ready()
            .await
            .map_err(|e| Status::unknown(e.to_string()))?;
        let version = wire::version(&first).unwrap();
        let (up, messages) = mpsc::channel(64);
        up.send(first).await.unwrap();
        let path = format!("/{SERVICE}/{METHOD}").parse().unwrap();
        let request = Request::new(ReceiverStream::new(messages));
        let down = grpc.streaming(request, path, Raw).await?.into_inner();
        Ok(Self {
            up,
            down,
            seq: 0,
            version,
            beat: 0,
        })
    }

    /// The next batch; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Vec<Wrote>> {
        let message = tokio::time::timeout(PATIENCE, self.down.message())
            .await
            .expect("a batch or the end")
            .ok()??;
        assert_eq!(wire::version(&message), Some(self.version));
        let batch: Batch<'_> = wire::decode(&message).unwrap();
        self.seq += 1;
        assert_eq!(batch.seq, self.seq, "batches are numbered from 1");
        let wrote = |w: &wire::Write<'_>| Wrote {
            key: w.key.to_vec(),
            value: w.value.to_vec(),
        };
        assert!(batch.writes.iter().all(|w| key::is_published(w.key)));
        Some(batch.writes.iter().map(wrote).collect())
    }

    /// Whether nothing comes for a moment. Only for what can't be waited for.
    pub(crate) async fn is_silent(&mut self) -> bool {
        let wait = Duration::from_millis(700);
        tokio::time::timeout(wait, self.down.message())
            .await
            .is_err()
    }

    /// Acknowledges everything so far.
    pub(crate) async fn ack(&self) {
        let written = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let ack = Up::Ack(Ack {
            seq: self.seq,
            written_at_ns: u64::try_from(written.unwrap().as_nanos()).unwrap(),
            refused: 0,
        });
        self.send(&ack).await;
    }

    /// Sends any message.
    pub(crate) async fn send(&self, up: &Up) {
        let message = wire::encode_for(self.version, up);
        self.up.send(message.into()).await.unwrap();
    }

    /// Passes reports of VMs on.
    pub(crate) async fn report(&self, reports: &[Report]) {
        let reports = reports.iter().map(wire::encode).collect();
        self.send(&Up::Reports(reports)).await;
    }

    /// Takes and acknowledges batches until loads satisfy a condition.
    pub(crate) async fn loads(&mut self, what: &str, is_so: impl Fn(&Loads) -> bool) -> Loads {
        let found = async {
            loop {
                let batch = self.next().await.expect("the stream goes on");
                self.ack().await;
                let head = batch.last().and_then(Wrote::head);
                let Some(loads) = batch.iter().find_map(Wrote::loads) else {
                    self.beat = head.map_or(self.beat, |head| head.beat);
                    continue;
                };
                let head = head.expect("a head follows loads");
                assert!(head.beat > self.beat, "VMs notice by the beat");
                self.beat = head.beat;
                if is_so(&loads) {
                    return loads;
                }
            }
        };
        tokio::time::timeout(2 * PATIENCE, found)
            .await
            .unwrap_or_else(|_| panic!("in vain: {what}"))
    }

    /// Takes and acknowledges batches until one has a head that satisfies a condition. Returns all
    /// writes.
    pub(crate) async fn until(&mut self, is_so: impl Fn(&Head) -> bool) -> Vec<Wrote> {
        let mut writes = Vec::new();
        loop {
            let batch = self.next().await.expect("the stream goes on");
            self.ack().await;
            writes.extend(batch);
            if writes
                .last()
                .and_then(Wrote::head)
                .is_some_and(|h| is_so(&h))
            {
                return writes;
            }
        }
    }
}

async fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = tower_connect(socket);
    Endpoint::from_static("http://sidecar")
        .connect_with_connector(connect)
        .await
        .unwrap()
}

fn tower_connect(
    socket: PathBuf,
) -> impl tonic::codegen::Service<
    Uri,
    Response = TokioIo<tokio::net::UnixStream>,
    Error = std::io::Error,
    Future: Send,
> + Send
+ 'static {
    Connector(socket)
}

#[derive(Clone)]
struct Connector(PathBuf);

impl tonic::codegen::Service<Uri> for Connector {
    type Response = TokioIo<tokio::net::UnixStream>;
    type Error = std::io::Error;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let socket = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) })
    }
}
