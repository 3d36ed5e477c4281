//! `kv-sim`: simulated engines, and load for any OpenAI endpoint.

mod cli;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use indicatif::{ProgressBar, ProgressStyle};
use kv_sim::engine::Engine;
use kv_sim::load::{self, Report};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Cli, Command, EngineArgs, LoadArgs, ReportArgs};

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Engine(args) => engine(args).await,
        Command::Load(args) => load(args).await,
        Command::Report(args) => report(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kv-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn engine(args: EngineArgs) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let engine = Engine::start(args.config()?).await?;
    // The first line tells scripts where to find an engine that took a free port.
    let mut first = serde_json::json!({
        "worker_id": engine.worker_id(),
        "address": engine.address().to_string(),
    });
    let (events, replay) = engine.event_addresses();
    if let Some(first) = first.as_object_mut() {
        let addresses = [("events", events), ("replay", replay)].into_iter();
        first.extend(addresses.filter_map(|(key, a)| Some((key.to_owned(), a?.into()))));
    }
    println!("{first}");
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    engine.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

async fn load(args: LoadArgs) -> anyhow::Result<ExitCode> {
    let options = args.options();
    // Hidden where stderr is no terminal.
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "{prefix} [{wide_bar}] {pos}/{len} {elapsed} {msg}",
    )?);
    bar.set_prefix(options.label.clone());
    let shown = bar.clone();
    let report = load::run(&options, move |progress| {
        shown.set_length(progress.total);
        shown.set_position(progress.ok + progress.failed);
        if progress.failed > 0 {
            shown.set_message(format!("{} failed", progress.failed));
        }
    })
    .await?;
    bar.finish_and_clear();
    print!("{}", load::table(std::slice::from_ref(&report)));
    if let Some(file) = &args.json {
        let json = serde_json::to_vec_pretty(&report)?;
        std::fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let failed: u64 = report.failed.values().sum();
    if failed > args.max_failures {
        let first = report.first_failure.as_deref().unwrap_or_default();
        eprintln!("kv-sim: {failed} requests failed; the first: {first}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn report(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let reports = args
        .files
        .iter()
        .map(|file| {
            let json = std::fs::read(file)?;
            Ok(serde_json::from_slice::<Report>(&json)?)
        })
        .zip(&args.files)
        .map(|(report, file): (anyhow::Result<Report>, _)| {
            report.with_context(|| format!("cannot read {}", file.display()))
        })
        .collect::<anyhow::Result<Vec<Report>>>()?;
    print!("{}", load::table(&reports));
    Ok(ExitCode::SUCCESS)
}
