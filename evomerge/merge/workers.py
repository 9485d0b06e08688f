"""Threads that merge: each one a whole small tensor, or a part of a large one.

torch uses one thread within them, so that as many tensors are merged side by side as there are cores.

Imports: torch.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

SHARED = 1 << 17  # entries from which work on a tensor is shared out
BLOCK = 2048  # entries that a compiled loop takes through all of its steps at once

_this = threading.local()


def count() -> int:
    """Threads that work at once may be shared out over: torch's, and 1 within one of them."""
    return 1 if getattr(_this, "works", False) else torch.get_num_threads()


def ranges(n: int, parts: int) -> list[tuple[int, int]]:
    """[0, n) in about that many ranges of whole blocks; in one where sharing it out does not pay."""
    if n < SHARED:
        return [(0, n)]
    step = -(-n // parts // BLOCK) * BLOCK
    return [(low, min(low + step, n)) for low in range(0, n, step)]


def shared_out(part: Callable[[int, int], T], n: int, parts: int | None = None) -> list[T]:
    """`part(low, high)` over [0, n) in order, in so many ranges (as many as threads), by all threads."""
    threads = count()
    first, *rest = ranges(n, parts or threads)
    if threads == 1 or not rest:
        return [part(*each) for each in (first, *rest)]
    others = [pool(threads).submit(part, *each) for each in rest]
    try:
        found = [part(*first)]
        for each, other in zip(rest, others, strict=True):  # what no thread has taken by now is done here
            found.append(part(*each) if other.cancel() else other.result())
        return found
    finally:  # after Ctrl-C, too: what a part reads may be freed when this returns
        wait([other for other in others if not other.cancel()])


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """As many threads, within which torch and `shared_out` have one."""
    ready = threading.Barrier(threads + 1)
    allowed = cores() if sys.platform == "linux" else None

    def begin() -> None:
        _this.works = True
        if allowed:
            with suppress(OSError):  # a core may have been taken away in the meantime
                os.sched_setaffinity(0, allowed)
        torch.get_num_threads()  # or torch would set the number of this thread later, to the process's
        torch.set_num_threads(1)
        ready.wait()

    before = torch.get_num_threads()
    started = ThreadPoolExecutor(threads, thread_name_prefix="merge", initializer=begin)
    try:
        for _ in range(threads):
            started.submit(int)
        ready.wait()
    except BaseException:  # no thread may wait for one that never came
        ready.abort()
        raise
    finally:
        torch.set_num_threads(before)  # of this thread, and of those to come
    return started


def cores() -> set[int]:
    """Those that any thread of this process may run on; an engine may have bound the calling one to one."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            found |= os.sched_getaffinity(int(thread))
    return found


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=pool.cache_clear)
