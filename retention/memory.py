"""The main memory that a process may still take, in bytes. Knows no accelerator."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """What the machine has free or could free at once, within the limit of a container; 0 where that is not known."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        free = os.sysconf(names[0]) * os.sysconf(names[1]) if known else 0
    try:
        limit, used = (int((CGROUP / f"memory.{what}").read_text(encoding="ascii")) for what in ("max", "current"))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return free
    return max(0, min(free, limit - used))
