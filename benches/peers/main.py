"""Routers beside each other: the same engines, the same requests, each with its own defaults.

Prints a table for each workload and leaves the results as JSON in target/bench/peers.
"""

import argparse
import collections
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import fetch
from arms import ARMS, BLOCK_SIZE, KV_SIM, MODEL, PEERS, ROOT, check_built
from mocker import word_level  # found where fetch looks
from processes import Failed, Processes, answers, free_ports, is_well

ENGINES = 8
BLOCKS = 3072
RUNS = 3
# Words that stand for token ids, as the engines read them.
VOCABULARY = 128_000
OUT = os.path.join(ROOT, "target", "bench", "peers")
TRACE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trace.jsonl")

# Requests at full length, and how they are asked for.
WORKLOADS = {
    "agents": (1500, ["--workload", "agents", "--rate", "27"]),
    "trace": (1500, ["--trace", TRACE, "--length-scale", "0.125", "--speed", "10"]),
    "unique": (800, ["--workload", "unique", "--rate", "25"]),
    "burst": (1280, ["--workload", "burst", "--rate", "27"]),
}

Engine = collections.namedtuple("Engine", "id port url events replay")


class Run(Processes):
    """One router before fresh engines."""

    def __init__(self, name):
        super().__init__(os.path.join(OUT, "logs", name))
        self.blocks = BLOCKS
        self.model = os.path.join(OUT, "model")

    def __enter__(self):
        super().__enter__()
        # A Unix socket's path is limited to 107 bytes, which a checkout's path may pass.
        self.sockets = tempfile.mkdtemp(prefix="kvr-", dir="/tmp")
        self.port = free_ports(1)[0]
        self.engines = []
        return self

    def start_engines(self, count=ENGINES, flags=()):
        ports = iter(free_ports(3 * count))
        for worker in range(1, count + 1):
            port, events, replay = (next(ports) for _ in range(3))
            engine = Engine(
                worker,
                port,
                f"http://127.0.0.1:{port}",
                f"tcp://127.0.0.1:{events}",
                f"tcp://127.0.0.1:{replay}",
            )
            self.engines.append(engine)
            argv = [KV_SIM, "engine", "--port", str(port), "--worker-id", str(worker), "--model", MODEL]
            argv += ["--block-size", str(BLOCK_SIZE), "--blocks", str(self.blocks), *flags]
            self.start(f"engine-{worker}", [*argv, "--events", engine.events, "--replay", engine.replay])
        for engine in self.engines:
            self.wait(f"engine {engine.id}", 20, lambda engine=engine: is_well(engine.url + "/health"))

    def __exit__(self, *args):
        super().__exit__(*args)
        shutil.rmtree(self.sockets, ignore_errors=True)

    def ports(self, count):
        return free_ports(count)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def output(self, argv):
        run = subprocess.run(argv, capture_output=True, text=True, check=False)
        if run.returncode:
            raise Failed(f"{argv[0]} {argv[1]}: {run.stderr.strip()}")
        return run.stdout

    def serves(self):
        """Whether the router answers."""
        body = {"model": MODEL, "prompt": "qb qc qd", "max_tokens": 1}
        answer = answers(f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode())
        return answer is not None and b"choices" in answer


def write_model(folder):
    """A model's folder with a tokenizer that reads words as the simulated engines do."""
    letters = str.maketrans("0123456789", "abcdefghij")
    words = ["q" + str(token).translate(letters) for token in range(VOCABULARY)]
    word_level(folder, words, BLOCKS * BLOCK_SIZE)


def measure(arm, workload, number, share):
    """Runs a workload against an arm; the file of its results."""
    requests, arguments = WORKLOADS[workload]
    requests = max(1, int(requests * share))
    result = os.path.join(OUT, f"{workload}-{arm}-{number}.json")
    with Run(f"{workload}-{arm}-{number}") as run:
        run.start_engines()
        ARMS[arm][1](run)
        run.wait(f"{arm} to route", 90, run.serves)
        count = "--limit" if "--trace" in arguments else "--requests"
        argv = [KV_SIM, "load", "--url", f"http://127.0.0.1:{run.port}", "--model", MODEL, "--label", arm]
        argv += ["--format", "text", "--seed", "1", count, str(requests), "--json", result]
        run.output([*argv, "--max-failures", str(requests), "--timeout-s", "120", *arguments])
    return result


def table(workload, results, lacking):
    """The medians of each arm's runs with the least and the most, as lines."""
    lines = [f"{workload}", f"  {'router':<22}{'ok':>11}{'TTFT p50':>18}{'p95':>18}{'p99':>18}{'ITL p99':>16}{'cached':>9}"]
    for arm, files in results.items():
        runs = [json.load(open(file, encoding="utf-8")) for file in files]
        if not runs:
            lines.append(f"  {arm:<22}{lacking.get(arm, 'no result')}")
            continue

        def spread(value, runs=runs):
            values = [value(run) for run in runs]
            middle = statistics.median(values)
            return f"{middle:.0f}" if len(values) == 1 else f"{middle:.0f} ({min(values):.0f}-{max(values):.0f})"

        ok = f"{sum(run['ok'] for run in runs)}/{sum(run['requests'] for run in runs)}"
        shares = [run["cached_share"] for run in runs if run["cached_share"] is not None]
        cached = f"{100 * statistics.median(shares):.0f} %" if shares else "-"
        times = "".join(f"{spread(lambda run, p=p: run['ttft_ms'][p]):>18}" for p in ("p50", "p95", "p99"))
        lines.append(f"  {arm:<22}{ok:>11}{times}{spread(lambda run: run['itl_ms']['p99']):>16}{cached:>9}")
        if arm in lacking:
            lines.append(f"  {'':<22}one run less: {lacking[arm]}")
    return "\n".join(lines)


def fetch_peers(routers):
    """Fetches what these routers need; by name why some of it is not there."""
    absent = {}
    for peer in sorted({ARMS[arm][0] for arm in routers} - {None}):
        print(f"==> fetching {peer} unless it is there", flush=True)
        reason = fetch.fetch(PEERS, peer)
        if reason:
            absent[peer] = f"not fetched: {reason}"
    return absent


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each router, interleaved")
    parser.add_argument("--share", type=float, default=1.0, help="part of each workload's requests")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--routers", nargs="+", choices=ARMS, default=list(ARMS))
    wanted = parser.parse_args()
    check_built()
    os.makedirs(OUT, exist_ok=True)
    write_model(os.path.join(OUT, "model"))

    absent = fetch_peers(wanted.routers)
    tables = []
    for workload in wanted.workloads:
        results = {arm: [] for arm in wanted.routers}
        lacking = {arm: absent[ARMS[arm][0]] for arm in wanted.routers if ARMS[arm][0] in absent}
        for number in range(wanted.runs):
            for arm in wanted.routers:
                if ARMS[arm][0] in absent:
                    continue
                print(f"==> {workload}, run {number + 1} of {wanted.runs}: {arm}", flush=True)
                try:
                    results[arm].append(measure(arm, workload, number, wanted.share))
                except Failed as failure:
                    lacking[arm] = str(failure)
                    print(f"    {failure}", flush=True)
        tables.append(table(workload, results, lacking))
        print(tables[-1], flush=True)
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"bench-peers: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
