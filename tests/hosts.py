"""Two hosts on this machine, for the tests: network namespaces with a switch between them, and host names of their own.

The disk is one, as a shared file system is.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
from launching import LAUNCH, QUIET, ROOT

ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
PORT = 29511


def refusal() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need root, iproute2 and util-linux"
    name = f"medqa-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """The two, joined, until the end of the `with` block; whatever was started on them is ended there."""

    def __init__(self) -> None:
        self._mark = f"medqa-{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Hosts":
        _clear_away()
        switch = f"{self._mark}-switch"
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for name, address in ADDRESSES.items():
                host = f"{self._mark}-{name}"
                _ip("netns", "add", host)
                _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", name, "netns", switch)
                _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
                _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    _ip("-n", host, "link", "set", link, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ending: object) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in (*ADDRESSES, "switch"):
            _remove(f"{self._mark}-{name}")

    def processes(self, name: str) -> list[int]:
        """Those that run on a host."""
        return _processes(f"{self._mark}-{name}")

    def cut_off(self, name: str) -> None:
        """Take the host's cable out of the switch: its own link stays up, and all that is sent vanishes."""
        _ip("-n", f"{self._mark}-switch", "link", "set", name, "nomaster")

    def start(self, name: str, log: Path, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """A command on a host, in a process group of its own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "ACCELERATE_"))}
        within = ["ip", "netns", "exec", f"{self._mark}-{name}", "unshare", "--uts"]
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
        with log.open("a") as told:
            process = subprocess.Popen(
                [*within, *named, *command], cwd=ROOT, stdout=told, stderr=told, text=True, start_new_session=True,
                env=kept | QUIET | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"} | environment,
            )  # fmt: skip
        self._started.append(process)
        return process

    def launch(self, rank: int, log: Path, *words: str) -> subprocess.Popen[str]:
        """The real launcher on host `rank` of two, one process each."""
        together = (
            "--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", ADDRESSES["alpha"], "--main_process_port", str(PORT),
        )  # fmt: skip
        command = [*LAUNCH, *together, "train.py", "--cpu", *words]
        return self.start(list(ADDRESSES)[rank], log, command, ACCELERATE_USE_CPU="true")


def _processes(namespace: str) -> list[int]:
    """Those that run in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _remove(namespace: str) -> None:
    """End what runs in it, and remove it, if it is there."""
    for pid in _processes(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _clear_away() -> None:
    """What tests left that were killed: namespaces whose maker, by the number in their name, is gone."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in found.splitlines():
        mark, number, *_ = [*line.split()[0].split("-"), "", ""]
        if mark == "medqa" and number.isdigit() and not psutil.pid_exists(int(number)):
            _remove(line.split()[0])


def _ip(*words: str) -> None:
    """iproute2's command."""
    subprocess.run(["ip", *words], check=True, capture_output=True)
