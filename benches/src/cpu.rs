//! What a process has used, from `/proc`.

use std::fs;
use std::time::Instant;

use anyhow::Context as _;

/// A thread and the CPU time it has used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Nanoseconds on a CPU.
    pub ns: u64,
}

/// All threads of a process.
///
/// # Errors
/// When the process is gone.
pub fn threads(process: u32) -> anyhow::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let dir = entry?.path();
        let id = dir
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.parse().ok());
        // A thread may end between listing and reading.
        let (Ok(name), Ok(times)) = (
            fs::read_to_string(dir.join("comm")),
            fs::read_to_string(dir.join("schedstat")),
        ) else {
            continue;
        };
        let ns = times.split(' ').next().and_then(|ns| ns.parse().ok());
        let name = name.trim().to_owned();
        threads.push(Thread {
            id: id.unwrap_or(0),
            name,
            ns: ns.unwrap_or(0),
        });
    }
    Ok(threads)
}

/// CPU time of a process's threads that live, in nanoseconds.
///
/// # Errors
/// When the process is gone.
pub fn total_ns(process: u32) -> anyhow::Result<u64> {
    Ok(threads(process)?.iter().map(|t| t.ns).sum())
}

/// What a piece of work took.
#[derive(Clone, Debug, PartialEq)]
pub struct Spent {
    /// CPU time of each process, in microseconds, in the order they were given; without that of
    /// threads that ended meanwhile.
    pub cpu_us: Vec<f64>,
    /// Time on the clock.
    pub seconds: f64,
}

/// Does some work and tells what these processes used meanwhile.
///
/// # Errors
/// When the work fails or a process is gone.
pub fn spent<T>(
    processes: &[u32],
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Spent)> {
    let all = || -> anyhow::Result<Vec<_>> { processes.iter().map(|p| threads(*p)).collect() };
    let (before, since) = (all()?, Instant::now());
    let done = work()?;
    let seconds = since.elapsed().as_secs_f64();
    // Thread by thread: one that ended takes its past with it, which must not count against the rest.
    let used = |(after, before): (Vec<Thread>, Vec<Thread>)| {
        let past = |id| before.iter().find(|t| t.id == id).map_or(0, |t| t.ns);
        let ns = after.iter().map(|t| t.ns.saturating_sub(past(t.id)));
        ns.sum::<u64>() as f64 / 1e3
    };
    let cpu_us = all()?.into_iter().zip(before).map(used).collect();
    Ok((done, Spent { cpu_us, seconds }))
}

/// Resident memory of a process, in bytes.
///
/// # Errors
/// When the process is gone.
pub fn resident(process: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|rest| rest.split_whitespace().next())
        .context("no VmRSS")?;
    Ok(kib.parse::<u64>()? * 1024)
}
