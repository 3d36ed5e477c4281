//! `kv-router`: the sidecar's command line.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use kv_router::config::{Config, ConfigErrors, Effective, Flags, Layer, from_environment, schema};
use kv_router::ingest::post;
use kv_router::{check_events, envoy, serve};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Tokenizing a text allocates for every word of it: the system's allocator takes 40 % of the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// KV-cache-aware routing for LLM fleets, inside Envoy.
#[derive(Debug, Parser)]
#[command(name = "kv-router", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the sidecar.
    Serve {
        #[command(flatten)]
        source: Source,
        /// Folder for the files that Envoy watches, instead of `envoy` in the state folder.
        #[arg(long)]
        files: Option<PathBuf>,
        /// How log lines look.
        #[arg(long, env = "KV_ROUTER_LOG_FORMAT", value_enum, default_value = "text")]
        log_format: LogFormat,
    },
    /// Prints the JSON Schema of the configuration file.
    Schema {
        /// Of the body of `POST /v1/events` instead.
        #[arg(long)]
        events: bool,
    },
    /// Prints a complete Envoy bootstrap and writes the files it watches.
    Envoy {
        #[command(flatten)]
        source: Source,
        /// Folder for the files that Envoy watches, instead of `envoy` in the state folder.
        #[arg(long)]
        files: Option<PathBuf>,
        /// Where Envoy has the workers' endpoints from: the sidecar, or the files, from which it
        /// starts without a sidecar too.
        #[arg(long, value_enum, default_value = "grpc")]
        endpoints: EndpointsFrom,
        /// Says what this bootstrap (YAML or JSON) lacks instead, and fails if anything.
        #[arg(long, value_name = "BOOTSTRAP")]
        check: Option<PathBuf>,
    },
    /// Questions about the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Says what an engine's events look like and what the index makes of them. Fails if they are
    /// not understood.
    CheckEvents(check_events::command::Command),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Prints every key with its value, where that comes from, and what a change of it restarts.
    /// Fails with everything that is wrong.
    Check {
        #[command(flatten)]
        source: Source,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Source {
    /// The configuration file.
    #[arg(long, env = "KV_ROUTER_CONFIG")]
    config: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointsFrom {
    Grpc,
    Files,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl Source {
    /// The layers over the file, the last one on top.
    fn layers(&self) -> Vec<Layer> {
        let mut layers = from_environment(environment());
        layers.extend(self.flags.layers.iter().cloned());
        layers
    }

    fn load(&self) -> anyhow::Result<Config> {
        Config::load(&self.config, &self.layers()).map_err(|errors| self.refuse(&errors))
    }

    fn refuse(&self, errors: &ConfigErrors) -> anyhow::Error {
        let file = self.config.display();
        anyhow::anyhow!("{file} is not a valid configuration\n{errors}")
    }
}

/// The variables that are text.
fn environment() -> impl Iterator<Item = (String, String)> {
    let text = |text: std::ffi::OsString| text.into_string().ok();
    std::env::vars_os().filter_map(move |(name, value)| Some((text(name)?, text(value)?)))
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kv-router: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve {
            source,
            files,
            log_format,
        } => {
            log(log_format);
            let config = source.load()?;
            for note in source.layers().iter().filter_map(Layer::note) {
                tracing::warn!("{note}");
            }
            serve(&source, files, config)?;
        }
        Command::Schema { events: false } => print(&format!("{:#}\n", schema()))?,
        Command::Schema { events: true } => print(&format!("{:#}\n", post::schema()))?,
        Command::Envoy {
            source,
            files,
            endpoints,
            check,
        } => {
            if let Some(bootstrap) = check {
                return check_bootstrap(&source.load()?, &bootstrap);
            }
            let config = source.load()?;
            let files = envoy::Files::new(&config, files)?;
            files.write(&config)?;
            let discovery = match endpoints {
                EndpointsFrom::Grpc => envoy::Discovery::Grpc,
                EndpointsFrom::Files => envoy::Discovery::Files,
            };
            print(&envoy::bootstrap(&config, &files, discovery))?;
        }
        Command::Config(ConfigCommand::Check { source, json }) => {
            let effective = Effective::load(&source.config, &source.layers());
            let effective = effective.map_err(|errors| source.refuse(&errors))?;
            if json {
                print(&format!("{:#}\n", serde_json::to_value(&effective)?))?;
            } else {
                print(&effective.to_string())?;
            }
        }
        Command::CheckEvents(command) => {
            let as_json = command.json;
            let report = command.run(&from_environment(environment()))?;
            if as_json {
                print(&format!("{:#}\n", serde_json::to_value(&report)?))?;
            } else {
                print(&report.to_string())?;
            }
            if !report.understood {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[tokio::main]
async fn serve(source: &Source, files: Option<PathBuf>, config: Config) -> anyhow::Result<()> {
    let cancel = CancellationToken::new();
    let signals = cancel.clone();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("shutting down");
        signals.cancel();
    });
    let source = serve::Source {
        file: source.config.clone(),
        layers: source.layers(),
        envoy_files: files,
    };
    serve::run(config, source, cancel).await
}

fn check_bootstrap(config: &Config, bootstrap: &std::path::Path) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(bootstrap)
        .with_context(|| format!("can't read {}", bootstrap.display()))?;
    let lacks = envoy::check(&text, config)?;
    for lack in &lacks {
        print(&format!("{lack}\n"))?;
    }
    if lacks.is_empty() {
        print("nothing is lacking\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

fn print(text: &str) -> std::io::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes())
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}
