"""How each router is put before the engines: with its own defaults and what it must be told."""

import json
import os
import sys

from fetch import program
from processes import Failed, is_well

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.append(os.path.join(ROOT, "envoy", "demo"))
import plain  # noqa: E402

RELEASE = os.path.join(ROOT, "target", "release")
ENVOY = os.path.join(ROOT, ".tools", "bin", "envoy")
KV_ROUTER = os.path.join(RELEASE, "kv-router")
KV_SIM = os.path.join(RELEASE, "kv-sim")
PEERS = os.path.join(ROOT, "target", "peers")
FILTER_WASM = os.path.join(ROOT, "target", "wasm32-unknown-unknown", "wasm", "kv_filter.wasm")
MODEL = "sim"
BLOCK_SIZE = 16


def ours(run, compat):
    """Envoy with the filter and the sidecar, which listens to the engines' own events."""
    admin, envoy_admin = run.ports(2)
    workers = [
        {
            "id": engine.id,
            "endpoint": f"127.0.0.1:{engine.port}",
            "events": {"zmq": {"endpoint": engine.events, "replay_endpoint": engine.replay}},
        }
        for engine in run.engines
    ]
    config = {
        "http_host": "127.0.0.1",
        "http_port": run.port,
        "admin": f"127.0.0.1:{admin}",
        "envoy_admin": f"127.0.0.1:{envoy_admin}",
        "socket": os.path.join(run.sockets, "bridge.sock"),
        "state_dir": os.path.join(run.folder, "sidecar"),
        "filter_wasm": FILTER_WASM,
        "kv_cache_block_size": BLOCK_SIZE,
        "models": [MODEL],
        "tokenizer": {"path": run.model},
        "decision_header": True,
        "workers": workers,
    }
    if compat:
        config["compat"] = "dynamo"
    file = run.write("kv-router.yaml", json.dumps(config))
    run.start("sidecar", [KV_ROUTER, "serve", "--config", file])
    run.wait("the sidecar", 60, lambda: is_well(f"http://127.0.0.1:{admin}/healthz"))
    bootstrap = run.write("envoy.yaml", run.output([KV_ROUTER, "envoy", "--config", file]))
    envoy(run, bootstrap)
    run.wait("the index", 60, lambda: is_well(f"http://127.0.0.1:{admin}/readyz"))


def envoy(run, bootstrap):
    alone = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
    run.start("envoy", [ENVOY, "--config-path", bootstrap, *alone])


def envoy_alone(run, policy):
    """Envoy by its own policy, as the demo compares with."""
    bootstrap = plain.bootstrap(run.port, [engine.port for engine in run.engines], policy)
    envoy(run, run.write("envoy.json", json.dumps(bootstrap)))


def sglang(run):
    """Its default policy, cache_aware: a tree of the texts that it has routed."""
    metrics = run.ports(1)[0]
    argv = [program(PEERS, "sglang", "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    argv += ["--port", str(run.port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    run.start("sglang-router", [*argv, "--worker-urls", *(engine.url for engine in run.engines)])


def vllm(run):
    """Its policy kv_aware, by the engines' events."""
    metrics = run.ports(1)[0]
    argv = [program(PEERS, "vllm", "vllm-router"), "--host", "127.0.0.1", "--port", str(run.port)]
    argv += ["--policy", "kv_aware", "--prometheus-port", str(metrics)]
    argv += ["--worker-urls", *(engine.url for engine in run.engines)]
    for engine in run.engines:
        argv += ["--kv-event-source", f"{engine.url}={engine.events}"]
        argv += ["--kv-event-replay-source", f"{engine.url}={engine.replay}"]
    run.start("vllm-router", [*argv, "--kv-event-block-size", str(BLOCK_SIZE), "--kv-event-model", MODEL])


def dynamo(run):
    """Its frontend in the mode kv, and each engine as one of its workers."""
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": os.path.join(run.folder, "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_EVENT_PLANE_HOST": "127.0.0.1",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
    }
    python = program(PEERS, "dynamo", "python")
    argv = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(run.port)]
    run.start("dynamo-frontend", [*argv, "--router-mode", "kv"], environment)
    for engine in run.engines:
        argv = [python, os.path.join(HERE, "dynamo_worker.py"), engine.url, engine.events, run.model]
        run.start(f"dynamo-worker-{engine.id}", [*argv, str(BLOCK_SIZE), str(run.blocks)], environment)
    for engine in run.engines:
        name = f"dynamo-worker-{engine.id}"
        run.wait(name, 60, lambda name=name: "registered" in run.said(name))


# By name: whose environment it needs, and how it is started.
ARMS = {
    "ours": (None, lambda run: ours(run, compat=False)),
    "ours-compat-dynamo": (None, lambda run: ours(run, compat=True)),
    "envoy-round-robin": (None, lambda run: envoy_alone(run, "ROUND_ROBIN")),
    "envoy-least-request": (None, lambda run: envoy_alone(run, "LEAST_REQUEST")),
    "sglang-router": ("sglang", sglang),
    "vllm-router": ("vllm", vllm),
    "dynamo": ("dynamo", dynamo),
}


def check_built():
    for file in (ENVOY, KV_ROUTER, KV_SIM, FILTER_WASM):
        if not os.path.exists(file):
            raise Failed(f"{file} is missing: make bench-peers builds it")
