"""What a person sees while a run goes on: one live line, a line per stage, and a log file.

On a terminal the line is redrawn; elsewhere a line is printed every `QUIET_SECONDS`.

Imports: `study`, rich; never torch.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from evomerge.study.study import Observer, Study
from evomerge.study.trial import FIXED, Trial

QUIET_SECONDS = 15.0  # between lines when the output is no terminal
LOG = "log.txt"


class LiveObserver(Observer):
    """Shows a run on `console` and writes every trial to `run_dir`/log.txt; a context manager."""

    def __init__(self, console: Console, run_dir: Path) -> None:
        self._console, self._path = console, run_dir / LOG
        self._live: Live | None = None
        self._printed = 0.0
        self._log = logging.getLogger("evomerge")
        self._handler: logging.Handler | None = None

    def __enter__(self) -> LiveObserver:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if error is not None and self._handler is not None:
            self._log.error("%s: %s", type(error).__name__, error)
        if self._handler is not None:
            self._log.removeHandler(self._handler)
            self._handler.close()

    def say(self, line: str) -> None:
        """Print one line above the live line and log it."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._log.info(line)

    def begin(self, study: Study, stage: str) -> None:
        """Name the stage and its size."""
        self._open_log()
        if stage == FIXED:
            self.say(f"fixed recipes: {len(study.plan.fixed)}")
        elif stage == "final":
            best = study.best
            known = "" if best is None else f"; best on calibration items: {best.fitness:.3f}"
            self.say(f"search ended after {len(study.log)} trials{known}. Now on fresh items:")
        else:
            space = next(s.space for s in study.plan.stages if s.name == stage)
            self.say(f"stage {stage}: {space.dimension} parameters, {study.plan.optimizer}")

    def trial(self, study: Study, trial: Trial) -> None:
        """Redraw the line, or print it when the last one is old enough."""
        self._log.info(
            "trial %d %s%s %s fitness %s recipe %s merge %.2fs evaluate %.2fs %s",
            trial.number,
            trial.stage,
            f" ({trial.label})" if trial.label else "",
            trial.outcome.value,
            "-" if trial.fitness is None else f"{trial.fitness:.4f}",
            trial.digest[:12],
            trial.merge_seconds,
            trial.evaluate_seconds,
            trial.error,
        )
        line = status_line(study, trial)
        if self._live is not None:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)
        elif time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _open_log(self) -> None:
        """The log file is opened once the run directory exists and is ours."""
        if self._handler is None:
            self._handler = logging.FileHandler(self._path, encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self._log.addHandler(self._handler)
            self._log.setLevel(logging.INFO)
            self._log.propagate = False


def status_line(study: Study, trial: Trial) -> str:
    """Trial, its fitness, the incumbent with its error bar, items per second and time left."""
    best = study.best
    parts = [f"trial {trial.number}", trial.label or trial.stage]
    parts.append(trial.outcome.value if trial.fitness is None else f"{trial.fitness:.3f}")
    if best is not None and best.fitness is not None:
        error = "" if best.stderr is None else f" ±{best.stderr:.3f}"
        parts.append(f"best {best.fitness:.3f}{error} (trial {best.number})")
    if study.seconds_per_item > 0:
        parts.append(f"{1 / study.seconds_per_item:.0f} items/s")
    share = study.share_used
    parts.append(f"{min(share, 1):.0%} of the search")
    left = time_left(study)
    if left is not None:
        parts.append(f"{left} left")
    return "  ".join(parts)


def time_left(study: Study) -> str | None:
    """Time left in the run's time budget, final part included; None without one."""
    seconds = study.plan.budget.seconds
    if seconds is None:
        return None
    left = max(0, int(seconds - study.clock()))
    hours, minutes = left // 3600, left // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{left % 60:02d}s"
