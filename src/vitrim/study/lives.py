"""Whether a worker is a process of this machine that has ended: its work can then be taken over without waiting."""

import os
import socket
from functools import cache
from hashlib import sha256
from pathlib import Path
from uuid import uuid4


def name_of_worker() -> str:
    """A new name for a worker of this process: host, process, a random part, machine, and when the process started."""
    pid = os.getpid()
    return f"{socket.gethostname()[:60]}:{pid}:{uuid4().hex[:8]}:{_machine()}:{_started(pid) or ''}"


def has_ended(worker: str) -> bool:
    """Whether the process behind this name is known to have ended; False where it cannot be known from here."""
    parts = worker.rsplit(":", 4)
    if len(parts) < 5 or not parts[1].isdecimal() or not parts[3] or not parts[4] or parts[3] != _machine():
        return False
    pid = int(parts[1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False  # A process of another user is alive.
    started = _started(pid)
    return started is not None and started != parts[4]


@cache
def _machine() -> str:
    """This machine since it was started, and this space of process numbers; empty where the system does not say it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the system's ticks; "ended" for one that its parent has not collected yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None
