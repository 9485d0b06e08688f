"""The optimizer's side of the search: proposals, the ask/tell protocol, parameters.

An optimizer knows nothing about models. It sees a flat list of parameters, is asked for a `Proposal` and
is told its fitness, larger is better; `None` stands for a trial without one (infeasible, failed) and
counts as worse than every other. Proposals are told in the order in which they were asked.

State is a replay: an optimizer made with the same arguments and given the same history through `replay`
continues exactly as the first would have. Nothing is pickled.

Imports: nothing of evomerge but errors; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Value = float | str
Params = Mapping[str, Value]


@dataclass(frozen=True)
class FloatParameter:
    """A real parameter in the closed interval [low, high]."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class CategoricalParameter:
    """A parameter with two or more named values."""

    name: str
    choices: tuple[str, ...]


Parameter = FloatParameter | CategoricalParameter


@dataclass(frozen=True)
class Proposal:
    """What `ask` returns.

    Attributes:
        number: position among this optimizer's proposals, from 0.
        params: one value per parameter, inside its bounds.
        token: JSON text that only the optimizer reads; hand it back unchanged.
    """

    number: int
    params: Params
    token: str = ""


Told = tuple[Proposal, float | None]


@dataclass(frozen=True)
class Start:
    """Where a search begins.

    Attributes:
        params: the point around which the first proposals are drawn, and the first proposal itself
            unless its fitness is in `known`.
        sigma: standard deviation of the first proposals, in units of each parameter's range, in (0, 1].
        known: further points of known fitness (fixed recipes, the stage before) that the optimizer may
            learn from; they count as no trials.
    """

    params: Params
    sigma: float = 0.2
    known: tuple[tuple[Params, float], ...] = ()


class Optimizer(Protocol):
    """Ask/tell, with replay instead of saved state."""

    name: str

    def ask(self) -> Proposal:
        """The next proposal. Raises `RuntimeError` when the one before has not been told."""
        ...

    def tell(self, proposal: Proposal, fitness: float | None) -> None:
        """Report the fitness of the last proposal; None: it has none. Raises `RuntimeError` out of turn."""
        ...

    def replay(self, history: Sequence[Told]) -> None:
        """Bring a fresh optimizer to the state after `history`; raises `RuntimeError` on a used one."""
        ...

    def should_stop(self) -> bool:
        """Whether the optimizer has converged and asking on is a waste."""
        ...
