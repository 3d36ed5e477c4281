"""The demo's processes and the one file, .run/state.json, that says which they are.

The file is rewritten at each start and stop, so whoever reads it can end what is running: the next
`envoy-up`, or `envoy-down`. A process is known by its id and its start time, so an id that the
system gave to another program is never signalled.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RUN = os.path.join(ROOT, ".run")
STATE = os.path.join(RUN, "state.json")
STOP_GRACE_S = 10


class DemoError(Exception):
    """A message for the user: what failed, and where to look."""


def start_time(pid):
    """When process `pid` started, in clock ticks since boot; None if it does not run."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name, second field, is in parentheses and may hold spaces: count from its end.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def free_port(preferred, taken):
    """`preferred` if nobody listens there, else a free port outside `taken`."""
    for port in (preferred, 0, 0, 0, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found = probe.getsockname()[1]
        if found not in taken:
            return found
    raise DemoError("no free port was found on 127.0.0.1")


def environment():
    """The caller's environment without the router's own variables, which go over the demo's file."""
    return {key: value for key, value in os.environ.items() if not key.startswith("DYN_")}


class Fleet:
    """What runs: `ports` by use, `processes` by name, `sockets` the folder of Unix sockets."""

    def __init__(self, state):
        self.ready = state["ready"]
        self.owner = state["owner"]
        self.ports = state["ports"]
        self.sockets = state["sockets"]
        self.processes = state["processes"]

    @classmethod
    def load(cls):
        """The fleet of the state file; None without one."""
        try:
            with open(STATE, encoding="utf-8") as file:
                return cls(json.load(file))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DemoError(f"{STATE} is not a state file of this demo ({error}): remove it") from error

    @classmethod
    def create(cls, preferred_ports):
        """A fleet without processes, on free ports; fails if another run has made one meanwhile."""
        os.makedirs(RUN, exist_ok=True)
        ports = {}
        for use, preferred in preferred_ports.items():
            ports[use] = free_port(preferred, ports.values())
        fleet = cls(
            {
                "ready": False,
                "owner": {"pid": os.getpid(), "started": start_time(os.getpid())},
                "ports": ports,
                # A Unix socket's path is limited to 107 bytes, which a checkout's path may pass.
                "sockets": tempfile.mkdtemp(prefix="kvr-", dir="/tmp"),
                "processes": {},
            }
        )
        part = fleet._write()
        try:
            os.link(part, STATE)
        except FileExistsError as error:
            os.rmdir(fleet.sockets)
            raise DemoError("another envoy-up is at work") from error
        finally:
            os.unlink(part)
        return fleet

    def save(self):
        os.replace(self._write(), STATE)

    def _write(self):
        """The state in a file of this process's own, to be moved into place."""
        part = f"{STATE}.{os.getpid()}"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(vars(self), file, indent=2)
            file.write("\n")
        return part

    def owner_runs(self):
        """Whether the envoy-up that made this fleet is still at work."""
        return start_time(self.owner["pid"]) == self.owner["started"]

    def running(self, name):
        process = self.processes[name]
        return process["started"] is not None and start_time(process["pid"]) == process["started"]

    def dead(self):
        """Names of processes that were started and do not run."""
        return [name for name in self.processes if not self.running(name)]

    def start(self, name, argv):
        """Starts a process of its own session, its output in .run/logs/NAME.log."""
        log = os.path.join(RUN, "logs", name + ".log")
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "wb") as output:
            child = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = {"pid": child.pid, "started": start_time(child.pid), "log": log}
        self.save()

    def stop(self, name):
        """Ends one process: asked first, killed after a grace."""
        self._signal(name, signal.SIGTERM)
        self._await_end([name])

    def stop_all(self):
        """Ends every process and removes the sockets and the state file; the logs stay."""
        for name in reversed(list(self.processes)):
            self._signal(name, signal.SIGTERM)
        self._await_end(list(self.processes))
        shutil.rmtree(self.sockets, ignore_errors=True)
        os.unlink(STATE)

    def _signal(self, name, number):
        if self.running(name):
            with contextlib.suppress(ProcessLookupError):
                # The leader of its own session, so its id is the group's too.
                os.killpg(self.processes[name]["pid"], number)

    def _await_end(self, names):
        deadline = time.monotonic() + STOP_GRACE_S
        while any(self.running(name) for name in names):
            if time.monotonic() > deadline:
                for name in names:
                    self._signal(name, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.02)
        for name in names:
            del self.processes[name]
        self.save()

    def wait(self, what, seconds, check):
        """Returns the first true value of `check()`; fails when a process dies or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            for name in self.dead():
                raise DemoError(f"{name} ended while waiting for {what}; the end of its log:\n{self.log_end(name)}")
            value = check()
            if value:
                return value
            if time.monotonic() > deadline:
                raise DemoError(f"{what}: not within {seconds} s; logs are in {os.path.join(RUN, 'logs')}")
            time.sleep(0.05)

    def log_end(self, name, lines=12):
        with open(self.processes[name]["log"], encoding="utf-8", errors="replace") as file:
            return "".join("    " + line for line in file.readlines()[-lines:])
