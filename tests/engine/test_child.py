"""A process of ours: answers in time or an error, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.engine.child import Child
from evomerge.errors import EngineError

SERVER = """
import os, signal, subprocess, sys, time
from evomerge.engine.child import serve

def answer(message, alive):
    if message["do"] == "echo":
        return message
    if message["do"] == "start":  # a worker, in a session of its own as far as this process can see to it
        worker = subprocess.Popen(["sleep", "600"], start_new_session=message["apart"])
        return {"pid": worker.pid}
    if message["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if message["do"] == "fail":
        raise ValueError("a reason")
    for _ in range(message["times"]):
        time.sleep(message["each"])
        alive()
    return {"slept": True}

serve(sys.argv[1:], answer)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    made = Child([sys.executable, "-c", SERVER], os.environ, tmp_path / "log")
    yield made
    made.end()


def gone(pid: int, seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_message_is_answered(child: Child):
    assert child.ask({"do": "echo", "text": "é"}, 20) == {"do": "echo", "text": "é"}


def test_signs_of_life_begin_the_time_limit_anew(child: Child):
    child.ask({"do": "echo"}, 20)
    assert child.ask({"do": "sleep", "times": 5, "each": 0.3}, 1.0) == {"slept": True}


def test_silence_beyond_the_limit_is_an_error_that_names_the_setting(child: Child):
    child.ask({"do": "echo"}, 20)
    with pytest.raises(EngineError, match=r"no sign of life for 1 s; its log is .*log.*`engine.timeout`"):
        child.ask({"do": "sleep", "times": 1, "each": 60}, 1.0)


def test_a_killed_process_is_an_error_that_says_how_it_ended(child: Child):
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        child.ask({"do": "die"}, 20)


def test_the_last_error_of_the_log_is_told(child: Child):
    with pytest.raises(EngineError, match=r"with exit code 1; its log .*ValueError: a reason"):
        child.ask({"do": "fail"}, 20)


@pytest.mark.parametrize("apart", [False, True])
def test_ending_it_ends_what_it_started(child: Child, apart: bool):
    worker = child.ask({"do": "start", "apart": apart}, 20)["pid"]
    child.end()
    assert gone(worker, 0.5)
    assert gone(child.pid, 0.5)


def test_workers_of_a_process_that_was_killed_are_ended_too(child: Child):
    worker = child.ask({"do": "start", "apart": False}, 20)["pid"]
    with pytest.raises(EngineError):
        child.ask({"do": "die"}, 20)
    child.end()
    assert gone(worker, 0.5)


def test_a_hung_process_and_its_workers_do_not_outlive_a_killed_parent(tmp_path: Path):
    code = f"""
import os, sys, threading, time
from pathlib import Path
from evomerge.engine.child import Child
child = Child([sys.executable, "-c", {SERVER!r}], os.environ, Path({str(tmp_path / "log")!r}))
worker = child.ask({{"do": "start", "apart": False}}, 30)["pid"]
print(child.pid, worker, flush=True)
child.ask({{"do": "sleep", "times": 1, "each": 600}}, 600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    assert all(gone(pid, 20) for pid in pids)
