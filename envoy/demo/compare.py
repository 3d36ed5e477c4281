"""The agents workload under three policies, on the same engines with empty caches each time."""

import os
import subprocess

import config
import http_json
import services
from fleet import ROOT, RUN, DemoError

REQUESTS = 600
RATE = 10
RESULTS = os.path.join(RUN, "results")


def run(fleet, say):
    """Measures each policy, leaves the router in mode kv and prints the table."""
    os.makedirs(RESULTS, exist_ok=True)
    ports = fleet.ports
    say("==> the agents workload under three policies (about a minute each)")

    say("    1 of 3: round-robin, the router's")
    set_mode(fleet, "round-robin")
    measure(fleet, "round-robin", ports["http"])

    say("    2 of 3: least-request, Envoy's own without the filter")
    config.write_plain_bootstrap(fleet)
    services.start_envoy(fleet, "envoy-least-request", config.PLAIN_BOOTSTRAP, ports["least_request_admin"])
    measure(fleet, "least-request", ports["least_request_http"])
    fleet.stop("envoy-least-request")

    say("    3 of 3: kv, the router's")
    set_mode(fleet, "kv")
    measure(fleet, "kv", ports["http"])

    say("\n" + run_sim("report", *map(result, ("round-robin", "least-request", "kv"))))


def set_mode(fleet, mode):
    """Rewrites the router's configuration; the sidecar reads it and tells the filter."""
    config.write_router_config(fleet, mode)
    services.await_mode(fleet, mode)


def measure(fleet, policy, port):
    clear_caches(fleet)
    run_sim(
        "load", "--url", f"http://127.0.0.1:{port}", "--model", config.MODEL, "--label", policy,
        "--workload", "agents", "--seed", "1", "--requests", str(REQUESTS), "--rate", str(RATE),
        "--json", result(policy),
    )  # fmt: skip


def result(policy):
    return os.path.join(RESULTS, policy + ".json")


def clear_caches(fleet):
    """Empties the engines' caches and waits until the router knows."""
    for worker in range(1, config.ENGINES + 1):
        answer = http_json.request(fleet.ports[f"engine_{worker}"], "POST", "/sim/clear")
        if answer is None or answer[0] >= 300:
            raise DemoError(f"engine {worker} did not clear its cache: {answer and answer[0]}")
    services.await_empty_index(fleet)


def run_sim(*arguments):
    """What kv-sim prints; its progress bar is shown as it goes."""
    done = subprocess.run([services.KV_SIM, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DemoError(f"kv-sim {arguments[0]} failed: see above\n{done.stdout}")
    return done.stdout
