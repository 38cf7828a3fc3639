"""How much memory this process may still use, and a check that a task fits into it."""

import ctypes
import resource
from pathlib import Path

from a3.core.errors import A3Error

GIB = 2**30

# Control groups of versions 1 and 2: the controller, and its files for limit and usage.
CGROUPS = (
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("", "memory.max", "memory.current"),
)


def require_memory(needed: int, what: str, advice: str) -> None:
    """Raise A3Error if `what` needs more bytes (`needed`) than are available."""
    at_hand = memory_at_hand()
    if needed > at_hand:
        raise A3Error(
            f"{what} needs at least {needed / GIB:.1f} GiB of memory, but {at_hand / GIB:.1f} GiB "
            f"are available. {advice}, or run it on a larger machine (docs/cluster.md)."
        )


def memory_at_hand() -> int:
    """Bytes that this process may still use, by limits of machine, control group and process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    left = [int(lines["MemAvailable"].split()[0]) * 1024]
    left += [limit - used for limit, used in map(group_memory, CGROUPS) if limit]
    # Of /proc/self/statm: all pages, and those of data.
    pages = [int(count) for count in Path("/proc/self/statm").read_text().split()]
    for of, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        limit, _ = resource.getrlimit(of)
        if limit != resource.RLIM_INFINITY:
            left.append(limit - used * resource.getpagesize())
    return max(0, min(left))


def return_memory() -> None:
    """Give the system the memory that this process has freed.

    glibc keeps freed weights of a layer, and reuses little of them for the next one's: without
    this, memory grows layer by layer. Other C libraries have no such call.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def group_memory(names: tuple[str, str, str]) -> tuple[int | None, int]:
    """Limit and use of this process's control group; no limit where there is none."""
    controller, limit, used = names
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == controller:
            folder = Path("/sys/fs/cgroup", controller, path.lstrip("/"))
            text = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            # Version 1 writes a number near 2^63 if there is no limit.
            if text != "max" and int(text) < 2**60:
                return int(text), int((folder / used).read_text())
    return None, 0
