"""Starts the demo's programs and waits until each answers."""

import json
import os
import socket
import subprocess

import config
import http_json
from fleet import ROOT, DemoError, environment

RELEASE = os.path.join(ROOT, "target", "release")
TOOLS = os.path.join(ROOT, ".tools", "bin")
KV_ROUTER = os.path.join(RELEASE, "kv-router")
KV_SIM = os.path.join(RELEASE, "kv-sim")
ENVOY = os.path.join(TOOLS, "envoy")
NATS_SERVER = os.path.join(TOOLS, "nats-server")


def start_all(fleet):
    """NATS, the engines, the sidecar and Envoy, until a request is routed by KV cache."""
    ports = fleet.ports
    fleet.start("nats", [NATS_SERVER, "--addr", "127.0.0.1", "--port", str(ports["nats"])])
    fleet.wait("NATS", 20, lambda: greets(ports["nats"]))

    workers = range(1, config.ENGINES + 1)
    for worker in workers:
        fleet.start(f"engine-{worker}", engine_command(fleet, worker))
    for worker in workers:
        port = ports[f"engine_{worker}"]
        fleet.wait(f"engine {worker}", 20, lambda port=port: http_json.is_ok(port, "/health"))

    config.write_router_config(fleet, "kv")
    fleet.start("sidecar", [KV_ROUTER, "serve", "--config", config.ROUTER_CONFIG])
    fleet.wait("the sidecar", 30, lambda: http_json.is_ok(ports["admin"], "/healthz"))
    config.write(config.ROUTED_BOOTSTRAP, bootstrap())
    start_envoy(fleet, "envoy", config.ROUTED_BOOTSTRAP, ports["envoy_admin"])
    fleet.wait("the sidecar's index", 30, lambda: http_json.is_ok(ports["admin"], "/readyz"))
    await_mode(fleet, "kv")


def engine_command(fleet, worker):
    return [
        KV_SIM, "engine", "--port", str(fleet.ports[f"engine_{worker}"]), "--worker-id", str(worker),
        "--model", config.MODEL, "--block-size", str(config.BLOCK_SIZE), "--blocks", str(config.ENGINE_BLOCKS),
        "--nats", f"nats://127.0.0.1:{fleet.ports['nats']}", "--encoding", "json",
        "--json-subject", config.JSON_SUBJECT,
    ]  # fmt: skip


def bootstrap():
    """Envoy's bootstrap for the router's configuration."""
    argv = [KV_ROUTER, "envoy", "--config", config.ROUTER_CONFIG]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"kv-router envoy failed: {done.stderr.strip()}")
    return done.stdout


def start_envoy(fleet, name, bootstrap_file, admin_port):
    # Hot restart would claim shared memory by a number common to every Envoy of the machine.
    alone = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
    fleet.start(name, [ENVOY, "--config-path", bootstrap_file, *alone])
    fleet.wait(name, 30, lambda: http_json.is_ok(admin_port, "/ready"))


def await_mode(fleet, mode):
    """Waits until Envoy's answers say that they were routed in `mode`."""
    probe = {"model": config.MODEL, "prompt": list(range(config.BLOCK_SIZE)), "max_tokens": 1}

    def routed():
        answer = http_json.request(fleet.ports["http"], "POST", "/v1/completions", probe)
        decision = json.loads(answer[1].get("x-kv-router-decision", "{}")) if answer else {}
        return decision.get("reason") == mode

    fleet.wait(f"a request routed by {mode}", 30, routed)


def await_empty_index(fleet):
    """Waits until no block is left in the sidecar's index, nor in the pages that Envoy holds."""

    def is_empty():
        index = http_json.get_json(fleet.ports["admin"], "/v1/index")
        return index and index["settled"] and index["stats"]["blocks"] == 0

    fleet.wait("an empty index", 30, is_empty)


def greets(port):
    """Whether NATS is there: it speaks first."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            return connection.recv(4) == b"INFO"
    except OSError:
        return False
