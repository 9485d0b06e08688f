"""A process of ours that may crash, hang or be killed: messages with a time limit, and no orphans.

The process leads a session of its own, so Ctrl-C does not reach it and its whole tree can be ended. It holds
one end of a pipe whose other end is ours: when we are gone, killed or not, it ends itself and its tree.

Imports: `evomerge.errors`, psutil.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

import evomerge.errors
from evomerge.errors import EngineError, EvomergeError

Message = dict[str, Any]

ALIVE = {"alive": True}  # what the process sends while it works, to show that it does
END_SECONDS = 30.0  # for a process tree to be gone after it was killed
GRACE_SECONDS = 2.0  # between the end of the other side and ours, for an idle process to end in order


def told(error: EvomergeError) -> Message:
    """One of our errors as a message."""
    return {"error": type(error).__name__, "message": str(error)}


def raise_told(message: Message) -> None:
    """Raise the error that a message tells of, if it tells of one."""
    if "error" in message:
        raise getattr(evomerge.errors, message["error"])(message["message"])


class Child:
    """A running process that answers messages.

    Args:
        command: its arguments; two file descriptors (messages, life line) are appended.
        environment: its environment variables.
        log: file that its output is appended to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair()
        line, self._life = os.pipe()
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(line)],
                env=dict(environment),
                pass_fds=(theirs.fileno(), line),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        theirs.close()
        os.close(line)
        self._messages = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Process id, which is also that of its session."""
        return self._process.pid

    def ask(self, message: Message, seconds: float) -> Message:
        """Send `message` and wait for the answer.

        Args:
            message: plain data.
            seconds: longest silence; a sign of life begins it anew.

        Raises:
            EngineError: the process is gone, or silent for too long. It should be killed then.
        """
        try:
            self._messages.send_bytes(json.dumps(message).encode())
            while self._messages.poll(seconds):
                answer: Message = json.loads(self._messages.recv_bytes())
                if answer != ALIVE:
                    return answer
        except (EOFError, OSError) as error:
            raise EngineError(f"the engine's process ended{self._how()}; {self.tail()}") from error
        raise EngineError(
            f"the engine's process gave no sign of life for {seconds:.0f} s; {self.tail()}. "
            "If its work takes that long, raise `engine.timeout`"
        )

    def _how(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=5)
            return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        return ""

    def tail(self) -> str:
        """Where its log is, and the log's last error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        errors = [line.strip() for line in lines if "Error" in line]
        return f"its log is {self.log}" + (f" and ends with: {errors[-1][:300]}" if errors else "")

    def end(self, seconds: float = 0.0) -> None:
        """End the process and all that it started; returns when they are gone.

        Args:
            seconds: to wait for it to end by itself before it is killed.
        """
        tree = list(self._tree())
        self._messages.close()
        with suppress(OSError):
            os.close(self._life)
        if seconds:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=seconds)
        limit = time.monotonic() + END_SECONDS
        while left := living([*tree, *self._tree()]):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.poll()  # a killed child is a zombie until it is waited for
            if time.monotonic() > limit:
                ids = ", ".join(str(process.pid) for process in left)
                raise EngineError(f"processes {ids} of the engine do not end; end them by hand")
            time.sleep(0.05)
        self._process.wait()

    def _tree(self) -> Iterator[psutil.Process]:
        """The processes of its session, and its descendants in other sessions."""
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.pid:
                    yield process
        with suppress(psutil.Error):
            yield from psutil.Process(self.pid).children(recursive=True)


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie, which nobody has waited for yet, does not."""
    result = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                result.append(process)
    return result


def serve(fds: Sequence[str], answer: Callable[[Message, Callable[[], None]], Message]) -> None:
    """In the process: answer messages until the other side closes.

    Args:
        fds: the two file descriptors that `Child` appended to the command.
        answer: `(message, sign of life) -> answer`.
    """
    messages, line = Connection(int(fds[0])), int(fds[1])
    for descriptor in (messages.fileno(), line):
        os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()

    def alive() -> None:
        messages.send_bytes(json.dumps(ALIVE).encode())

    while True:
        try:
            message = json.loads(messages.recv_bytes())
        except EOFError:
            return
        messages.send_bytes(json.dumps(answer(message, alive)).encode())


def _end_with(line: int) -> None:
    """Wait until the parent is gone or lets go, then end the whole process group."""
    os.read(line, 1)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)
