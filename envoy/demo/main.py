"""make envoy-up and make envoy-down: a fleet on this machine, and three policies compared on it.

Four simulated engines behind one Envoy with the filter, the sidecar and NATS, all in the
background, all on 127.0.0.1. Standard library only; Python 3.9 or later.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import compare
import config
import services
from fleet import ROOT, RUN, DemoError, Fleet


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(text):
    print(text, flush=True)


def up():
    fleet = Fleet.load()
    if fleet and not fleet.ready and fleet.owner_runs():
        raise DemoError(f"another envoy-up is at work (process {fleet.owner['pid']})")
    if fleet and fleet.ready and not fleet.dead():
        say("envoy-up is up already.")
        how_to(fleet)
        return
    if fleet:
        say("==> cleaning up after an earlier envoy-up")
        fleet.stop_all()
    build = subprocess.run(["make", "tools", "build"], cwd=ROOT, check=False)
    if build.returncode:
        raise DemoError("the build failed: see above")
    shutil.rmtree(RUN, ignore_errors=True)
    fleet = Fleet.create(config.PORTS)
    try:
        say(f"==> starting NATS, {config.ENGINES} engines, the sidecar and Envoy (seconds)")
        services.start_all(fleet)
        compare.run(fleet, say)
        fleet.ready = True
        fleet.save()
    except BaseException:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        say("==> stopping what was started; the logs stay in .run/logs")
        fleet.stop_all()
        raise
    how_to(fleet)


def how_to(fleet):
    ports = fleet.ports
    say(
        f"""
Send a request; its decision is in the answer's header x-kv-router-decision. Send it twice: the
second time the engine that has the prompt's blocks is chosen for them.

  curl -i http://127.0.0.1:{ports["http"]}/v1/completions -H 'content-type: application/json' \\
    -d '{{"model": "{config.MODEL}", "prompt": ['$(seq -s, 1 256)'], "max_tokens": 8}}'

What the router knows: curl http://127.0.0.1:{ports["admin"]}/v1/workers   (also /v1/index, /metrics)
Envoy's admin page:    http://127.0.0.1:{ports["envoy_admin"]}
Configuration:         .run/kv-router.yaml, read again when it changes
Logs:                  .run/logs
To stop:               make envoy-down"""
    )


def down():
    fleet = Fleet.load()
    if fleet is None:
        say("envoy-up is not up.")
    elif not fleet.ready and fleet.owner_runs():
        say(f"==> stopping the envoy-up that is at work (process {fleet.owner['pid']})")
        os.kill(fleet.owner["pid"], signal.SIGTERM)
        deadline = time.monotonic() + 60
        while fleet.owner_runs():
            if time.monotonic() > deadline:
                raise DemoError(f"process {fleet.owner['pid']} does not end")
            time.sleep(0.05)
    else:
        say("==> stopping " + ", ".join(fleet.processes))
        fleet.stop_all()
    shutil.rmtree(RUN, ignore_errors=True)


def interrupt(number, _frame):
    raise KeyboardInterrupt(number)


def main():
    commands = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit("usage: main.py up|down")
    for number in STOPPING:
        signal.signal(number, interrupt)
    try:
        commands[sys.argv[1]]()
    except DemoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
