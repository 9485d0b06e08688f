"""The protocol of asking and telling, kept once for every optimizer.

An optimizer says how it proposes, how it learns and how it restores one finished proposal; whose turn it is,
what may be told and how a history is replayed is decided here.

Imports: `evomerge.errors` and `search.base`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from evomerge.errors import StorageError
from evomerge.search.base import Proposal, Told


class Turns(ABC):
    """An `Optimizer` whose `ask` and `tell` alternate."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open: Proposal | None = None
        self._finished = 0

    def ask(self) -> Proposal:
        """The next proposal. Raises `RuntimeError` when the one before has not been told."""
        if self._open is not None:
            raise RuntimeError(
                f"`ask` was called last and proposal {self._open.number} has not been told; call `tell` first"
            )
        self._open = self._propose(self._finished)
        return self._open

    def tell(self, proposal: Proposal, fitness: float | None) -> None:
        """Report the fitness of the last proposal, larger is better; None: it has none.

        Raises:
            RuntimeError: nothing has been asked, or `proposal` is not what was asked last.
            ValueError: `fitness` is NaN or infinite.
        """
        if self._open is None:
            last = "`tell` was called last" if self._finished else "nothing has been asked"
            raise RuntimeError(f"{last}, so no proposal waits for a fitness; call `ask` first")
        if proposal != self._open:
            raise RuntimeError(
                f"`ask` was called last and gave proposal {self._open.number}, but `tell` got another with "
                f"number {proposal.number}; tell proposals in the order asked and unchanged"
            )
        _check_fitness(proposal, fitness)
        self._learn(fitness)
        self._open = None
        self._finished += 1

    def replay(self, history: Sequence[Told]) -> None:
        """Bring a fresh optimizer to the state after `history`.

        Raises:
            RuntimeError: this optimizer has been asked or told something already.
            StorageError: `history` is not one that an optimizer made with these arguments can have had.
        """
        if self._open is not None or self._finished:
            last = "tell" if self._open is None else "ask"
            raise RuntimeError(f"`{last}` was called last; replay a history into a fresh optimizer only")
        for proposal, fitness in history:
            if proposal.number != self._finished:
                raise StorageError(
                    f"the history has proposal {proposal.number} where {self._finished} was expected; replay "
                    "all proposals from 0 in the order asked"
                )
            _check_fitness(proposal, fitness)
            self._restore(proposal, fitness)
            self._finished += 1

    @abstractmethod
    def should_stop(self) -> bool:
        """Whether the optimizer has converged and asking on is a waste."""

    @abstractmethod
    def _propose(self, number: int) -> Proposal:
        """Proposal `number`; called once per number, or once more by `_restore`."""

    @abstractmethod
    def _learn(self, fitness: float | None) -> None:
        """Take in the fitness of what `_propose` gave last."""

    @abstractmethod
    def _restore(self, proposal: Proposal, fitness: float | None) -> None:
        """What `_propose` and `_learn` would have done for a proposal of an earlier session."""


def _check_fitness(proposal: Proposal, fitness: float | None) -> None:
    if fitness is not None and not math.isfinite(fitness):
        raise ValueError(
            f"fitness of proposal {proposal.number} is {fitness}, but must be a finite number, or None where "
            "there is none"
        )


def foreign_history(optimizer: str, proposal: Proposal, clause: str) -> StorageError:
    """The error for a proposal of the history that this optimizer cannot have made."""
    return StorageError(
        f"proposal {proposal.number} of the history does not fit optimizer `{optimizer}`: {clause}; the "
        "search space, the optimizer or a library version has changed since the run began. Restore it, or "
        "begin a new run"
    )
