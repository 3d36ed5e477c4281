"""The processes of one run, their ports and their folder; all end with it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request


class Failed(Exception):
    """A program that did not start or did not answer: which, and the end of its log."""


class Processes:
    """A context: leaving it ends what was started, the last first."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def __enter__(self):
        os.makedirs(self.folder, exist_ok=True)
        return self

    def __exit__(self, *_):
        for _, child, _ in reversed(self.started):
            with contextlib.suppress(ProcessLookupError):
                # Each leads a session of its own, so its id is the group's too.
                os.killpg(child.pid, signal.SIGTERM)
        for _, child, _ in self.started:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def start(self, name, argv, environment=None):
        log = os.path.join(self.folder, name + ".log")
        with open(log, "wb") as output:
            child = subprocess.Popen(
                argv,
                env={**clean(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append((name, child, log))

    def members(self, without=()):
        """The processes that live of what was started, but for these names: a program's children too."""
        groups = {child.pid for name, child, _ in self.started if not name.startswith(tuple(without))}
        living = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return [process for process in living if group_of(process) in groups]

    def said(self, name):
        """What a program has written so far."""
        with open(os.path.join(self.folder, name + ".log"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def wait(self, what, seconds, check):
        deadline = time.monotonic() + seconds
        while not check():
            for name, child, log in self.started:
                if child.poll() is not None:
                    raise Failed(f"{name} ended while waiting for {what}: {end_of(log)}")
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not within {seconds} s; logs are in {self.folder}")
            time.sleep(0.05)


def clean():
    """The caller's environment without variables that routers would take for settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("DYN_", "KV_", "NATS_"))}


def group_of(process):
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return None


def end_of(log):
    with open(log, encoding="utf-8", errors="replace") as file:
        return " / ".join(line.strip() for line in file.readlines()[-3:])


def free_ports(count):
    """Ports of 127.0.0.1 that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(url, body=None):
    """The body of a good answer, else None."""
    headers = {"content-type": "application/json"} if body else {}
    request = urllib.request.Request(url, data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.read()
    except (OSError, urllib.error.URLError):
        return None


def is_well(url):
    """Whether there is a good answer."""
    return answers(url) is not None
