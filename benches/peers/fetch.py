"""Fetches the peers from the Python package index, each into a virtual environment of its own."""

import os
import shutil
import subprocess
import sys
import venv

# Dynamo's packages are named once, where its simulated engine is fetched too.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "parity"))
from mocker import DYNAMO, NEEDS  # noqa: E402

# By environment, the calls of pip that fill it.
PEERS = {
    "sglang": [["sglang-router==0.3.2"]],
    "vllm": [["vllm-router==0.1.17"]],
    "dynamo": [NEEDS, ["--no-deps", *DYNAMO]],
}


def program(folder, peer, name):
    """A program of a peer's environment."""
    return os.path.join(folder, peer, "bin", name)


def fetch(folder, peer):
    """Makes a peer's environment unless it is there; why it could not, else None."""
    env = os.path.join(folder, peer)
    done = os.path.join(env, "fetched")
    if os.path.exists(done):
        return None
    shutil.rmtree(env, ignore_errors=True)
    try:
        venv.create(env, with_pip=True)
        for packages in PEERS[peer]:
            pip = [program(folder, peer, "pip"), "install", "--quiet", "--disable-pip-version-check", *packages]
            run = subprocess.run(pip, capture_output=True, text=True, check=False)
            if run.returncode:
                return run.stderr.strip().splitlines()[-1]
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    with open(done, "w", encoding="utf-8") as file:
        file.write("\n")
    return None
