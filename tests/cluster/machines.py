"""Machines on one: namespaces of Linux with an address, a host name, processes and folders of their own.

Each program is a session of its own: the system shares the processor out between sessions, as between machines, and
Ctrl-C reaches the test alone.

What a machine shares with the others is read-only: the system's programs, Python, the packages, this project. Its
`/tmp`, `/root` and `/dev/shm` are its own and empty. All are plugged into one switch, a bridge in a namespace too, from
which nothing leads outside.

Nothing has to be cleaned up. A machine lives as long as its first process, which the system kills with the process that
made it (also by kill -9); with it go its other processes, network and folders.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NET = "10.77.0"
_ALONE = "--net --mount --pid --uts --ipc"
# The root of a machine: what it shares, read-only, then what is its own. $1: an empty folder, $2: its name.
_ROOT = r"""
set -e
mount -t tmpfs -o size=2g machine "$1"
cd "$1"
share() { mkdir -p "$1/$2"; mount --bind "$2" "$1/$2"; mount -o remount,bind,ro "$1/$2"; }
for place in /bin /etc /lib /lib64 /opt /sbin /usr "${@:3}"; do
  if [ -L "$place" ]; then ln -s "$(readlink "$place")" "$1$place"; elif [ -d "$place" ]; then share "$1" "$place"; fi
done
mkdir -p dev/shm proc root run sys tmp var/tmp
mount --rbind /dev dev
mount -t tmpfs -o size=512m memory dev/shm
mount -t proc processes proc
mount -t sysfs -o ro system sys
chmod 1777 tmp dev/shm
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$2" >hosts
mount --bind hosts etc/hosts
hostname "$2"
ip link set lo up
exec chroot "$1" /bin/bash -c 'cd /root; echo up; while :; do sleep 1000; done'
"""
_SWITCH = (
    "ip link set lo up; ip link add switch type bridge; ip link set switch up; echo up; while :; do sleep 1000; done"
)


def cannot() -> str | None:
    """Why machines cannot be made here, if so."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "machines are made of namespaces of Linux, by root"
    missing = [name for name in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed; the packages are iproute2 and util-linux"
    tried = _run(*f"unshare {_ALONE} --fork ip link add probe type veth peer name eborp".split(), check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """One of them.

    Attributes:
        address: on the switch.
        pid: of its first process, as this machine sees it.
    """

    def __init__(self, name: str, number: int, switch: int, folder: Path) -> None:
        self.name, self.address, self._switch, self._port = name, f"{NET}.{number}", switch, f"port{number}"
        self.log = folder / f"{name}.log"
        self._started: list[subprocess.Popen[bytes]] = []
        (root := folder / name).mkdir()
        shared = [str(path) for path in (ROOT, sys.prefix, sys.base_prefix)]
        self._first, self.pid = _first_process(["/bin/bash", "-c", _ROOT, "root", str(root), name, *shared])
        _run("nsenter", "-t", str(switch), "--net", "ip", "link", "add", self._port, "type", "veth", "peer", "name",
             "eth0", "netns", str(self.pid))  # fmt: skip
        self._on_switch(f"ip link set {self._port} master switch up")
        _run("nsenter", "-t", str(self.pid), "--net", "sh", "-ec",
             f"ip address add {self.address}/24 dev eth0; ip link set eth0 up")  # fmt: skip

    def start(self, words: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program there, with this environment and no other; what it prints is added to the machine's log."""
        with self.log.open("ab") as file:
            started = subprocess.Popen(
                ["nsenter", "-t", str(self.pid), *_ALONE.split(), "--root", "env", "-C", "/root", *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=self._environment(environment),
                start_new_session=True,
            )  # fmt: skip
        self._started.append(started)
        return started

    def run(self, words: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 1200) -> str:
        """Run a program there to its end; what it printed. Raises AssertionError if it fails."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), *_ALONE.split(), "--root", "env", "-C", "/root", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=self._environment(environment),
            timeout=timeout, check=False, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {shlex.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def unplug(self) -> None:
        """Take it off the switch: no word comes in or out, and no connection is closed."""
        self._on_switch(f"ip link set {self._port} down")

    def plug(self) -> None:
        """Undo `unplug`."""
        self._on_switch(f"ip link set {self._port} up")

    def kill(self) -> None:
        """Cut the power: all its processes are killed at once."""
        if self._first.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        for process in (self._first, *self._started):
            process.communicate()

    def _on_switch(self, command: str) -> None:
        _run("nsenter", "-t", str(self._switch), "--net", *command.split())

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        path = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        own = {"PATH": path, "HOME": "/root", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200",
               "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}  # fmt: skip
        return own | dict(more or {})


class Site:
    """Machines on one switch.

    Args:
        folder: for their logs and roots.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._machines = folder, list[Machine]()
        self._first, self._switch = _first_process(["/bin/bash", "-c", _SWITCH])

    def machine(self, name: str) -> Machine:
        """A new one."""
        made = Machine(name, len(self._machines) + 1, self._switch, self._folder)
        self._machines.append(made)
        return made

    def close(self) -> None:
        """End all of them."""
        for machine in self._machines:
            machine.kill()
        os.kill(self._switch, signal.SIGKILL)
        self._first.communicate()


def within(patience_s: float, true: Callable[[], object], what: str) -> None:
    """Wait until it is true. Raises AssertionError when it is not for so long."""
    until = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < until, f"for {patience_s:.0f} s in vain: {what}"
        time.sleep(0.2)


def _first_process(words: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """The first process of new namespaces, once it says that it is up; what was started here, and its pid here."""
    outer = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *_ALONE.split(), "--fork", "--kill-child", "--", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert outer.stdout
    assert outer.stderr
    if outer.stdout.readline() != "up\n":
        raise RuntimeError(f"a machine does not start: {outer.stderr.read()}")
    return outer, int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])


def _run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=check)
