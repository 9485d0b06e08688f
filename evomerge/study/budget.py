"""How much a run may spend: trials, seconds, item evaluations; whichever comes first.

Imports: `errors`; never torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from evomerge.errors import ConfigError

_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER} ?h)? ?(?:{_NUMBER} ?m(?:in)?)? ?(?:{_NUMBER} ?s)?")
_UNTIL = re.compile(r"until (\d{1,2}):(\d{2})")


def seconds_of(text: str, now: datetime) -> float:
    """Seconds that `8h`, `90m`, `1h30m`, `45s` or `until 07:30` stand for, counted from `now`.

    `until` names the next such time of the local clock.

    Raises:
        ConfigError: neither form, or a time of zero length.
    """
    end = end_of(text, now)
    if end is not None:
        return (end - now).total_seconds()
    if (match := _DURATION.fullmatch(" ".join(text.lower().split()))) and any(match.groups()):
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        if total := hours * 3600 + minutes * 60 + seconds:
            return total
    raise ConfigError(
        f"time budget {text!r} is not understood; write a duration such as `8h`, `90m` or `1h30m`, "
        "or a time of day such as `until 07:30`"
    )


def end_of(text: str, now: datetime) -> datetime | None:
    """The moment that `until 07:30` names, the next one after `now`; None when `text` is no such form."""
    match = _UNTIL.fullmatch(" ".join(text.lower().split()))
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        return None
    end = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    return end if end > now else end + timedelta(days=1)


@dataclass(frozen=True)
class Budget:
    """Limits of a whole run; None is no limit.

    Attributes:
        trials: trials of every kind and outcome, fixed recipes included.
        seconds: of the run's own clock, which stands still while no process works on the run; selection,
            held-out items and export included.
        items: item evaluations on calibration items.
    """

    trials: int | None = None
    seconds: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class Spent:
    """What has been spent at some moment of a run."""

    trials: int = 0
    seconds: float = 0.0
    items: int = 0


def used(budget: Budget, start: Spent, now: Spent, reserve: float) -> float:
    """Share of the search's budget that is used, in [0, inf): the largest over the three limits.

    Args:
        budget: limits of the run.
        start: what had been spent when the search began (after the fixed recipes). A limit that they
            reached is used up.
        now: what has been spent by now.
        reserve: seconds kept back for selection, held-out items and export.
    """
    pairs = (
        (budget.trials, start.trials, now.trials, 0.0),
        (budget.seconds, start.seconds, now.seconds, reserve),
        (budget.items, start.items, now.items, 0.0),
    )
    shares = [0.0]
    for limit, begun, spent, kept in pairs:
        if limit is not None:
            room = limit - kept - begun
            shares.append((spent - begun) / room if room > 0 else 1.0)
    return max(shares)
