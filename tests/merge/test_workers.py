"""Threads that merge."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from evomerge.merge.workers import BLOCK, SHARED, pool, ranges, shared_out

N = 3 * SHARED + 77


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def test_torch_has_one_thread_within_a_worker_and_as_many_as_before_outside():
    assert pool(2).submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


def test_parts_come_in_order_whole_blocks_and_all_of_them():
    parts = shared_out(lambda low, high: (low, high), N, 5)
    assert parts == ranges(N, 5)
    assert [low for low, _ in parts] == [0, *(high for _, high in parts[:-1])]
    assert parts[-1][1] == N
    assert all(low % BLOCK == 0 for low, _ in parts)


def test_a_worker_shares_nothing_out():
    inside = pool(2).submit(lambda: shared_out(lambda low, high: threading.get_ident(), N, 4)).result()
    assert len(set(inside)) == 1


def test_what_busy_threads_do_not_take_is_done_by_the_one_that_asks():
    free = threading.Event()
    busy = [pool(2).submit(free.wait) for _ in range(2)]
    try:
        idents = shared_out(lambda low, high: threading.get_ident(), N, 4)
    finally:
        free.set()
    assert set(idents) == {threading.get_ident()}
    assert all(each.result() for each in busy)


def test_after_an_error_no_part_is_still_running():
    started, ended = threading.Event(), threading.Event()

    def part(low: int, high: int) -> None:
        if not low:
            assert started.wait(20)
            raise ValueError("the first part")
        started.set()
        time.sleep(0.2)
        ended.set()

    with pytest.raises(ValueError, match="the first part"):
        shared_out(part, N, 2)
    assert ended.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to cores on Linux only")
def test_workers_run_on_every_core_of_the_process_where_the_caller_is_bound_to_one():
    code = """
import os, threading, torch
from evomerge.merge.workers import pool
torch.set_num_threads(2)
before, end = os.sched_getaffinity(0), threading.Event()
thread = threading.Thread(target=end.wait)  # holds all cores, as the others of an engine do
thread.start()
os.sched_setaffinity(0, {min(before)})
found = pool(2).submit(os.sched_getaffinity, 0).result()
end.set()
assert found == before, (found, before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_small_tensor_is_not_shared_out():
    assert shared_out(lambda low, high: (low, high), SHARED - 1) == [(0, SHARED - 1)]


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, signal, torch
from evomerge.merge.workers import SHARED, shared_out
torch.set_num_threads(2)
shared_out(lambda low, high: None, 4 * SHARED)
child = os.fork()
if not child:
    signal.alarm(20)
    assert len(shared_out(lambda low, high: low, 4 * SHARED, 4)) == 4
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
