"""Optuna's samplers, each behind the one ask/tell protocol.

A sampler is handed a study in memory that holds every finished proposal. It is made anew for every ask, with
a seed that is a function of the run's seed and the proposal's number: an ask is then a pure function of the
history, and a replay adds trials without asking again. What samplers note in a trial or in the study (a
generation number, a position in a sequence) travels in the proposal's token.

Imports: optuna, `evomerge.errors` and `search`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from evomerge.errors import ConfigError
from evomerge.search.axes import Axes, check_options, component_seed, start_is_known
from evomerge.search.base import Params, Proposal, Start, Value
from evomerge.search.turns import Turns, foreign_history

# Short names; every other sampler goes by its class name.
SAMPLERS = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "brute_force": "BruteForceSampler",
}
REFUSED = {
    "CmaEsSampler": "it keeps a pickled optimizer in every trial; use `cma` or `mixed`",
    "GridSampler": "it needs the search space a second time; use `brute_force`",
    "PartialFixedSampler": "it wraps another sampler; leave fixed parameters out of the search space",
}
NEEDS = {"GPSampler": ("torch", "scipy"), "QMCSampler": ("scipy",)}
# Arguments that a configuration file cannot hold, or that are not the user's to set.
NOT_OPTIONS = {"seed", "population_size", "constraints_func", "independent_sampler", "gamma", "weights"}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "TPESampler": {"constant_liar": False},  # nothing runs beside an ask; off, it notes nothing in the trial
    "GPSampler": {"warn_independent_sampling": False},
    "QMCSampler": {"scramble": True, "warn_independent_sampling": False},
}


class OptunaOptimizer(Turns):
    """One Optuna sampler and its study in memory."""

    def __init__(
        self,
        name: str,
        axes: Axes,
        *,
        seed: int,
        start: Start,
        population_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name)
        self._axes, self._seed, self._start = axes, seed, start
        self._starts_with_start = not start_is_known(start)
        self._class = sampler_class(name)
        self._arguments = _arguments(name, self._class, axes, population_size, options or {})
        self._distributions = _distributions(axes)
        self._worst = math.inf
        self._seen: set[tuple[int, ...]] = set()
        self._storage = optuna.storages.InMemoryStorage()
        with quiet():
            self._study = optuna.create_study(
                study_name="search", storage=self._storage, direction="maximize", sampler=self._sampler(0, 0)
            )
            self._id = self._storage.get_study_id_from_name("search")
            for position, (params, fitness) in enumerate(start.known):
                self._finish(self._asked(self._sampler(1, position), params), fitness)

    def should_stop(self) -> bool:
        """Whether every combination of the choices has been told; never with a float parameter."""
        return not self._axes.floats and len(self._seen) >= math.prod(
            len(c.choices) for c in self._axes.categoricals
        )

    def _propose(self, number: int) -> Proposal:
        before = dict(self._storage.get_study_system_attrs(self._id))
        with quiet():
            fixed = self._start.params if number == 0 and self._starts_with_start else None
            trial = self._asked(self._sampler(0, number), fixed)
        params: dict[str, Value] = {p.name: trial.params[p.name] for p in self._axes.parameters}
        params.update({p.name: float(params[p.name]) for p in self._axes.floats})
        after = self._storage.get_study_system_attrs(self._id)
        notes = {
            "trial": trial.system_attrs,
            "study": {key: value for key, value in after.items() if before.get(key) != value},
        }
        return Proposal(number, params, json.dumps(notes))

    def _learn(self, fitness: float | None) -> None:
        self._finish(self._study.get_trials(deepcopy=False)[-1], fitness)

    def _restore(self, proposal: Proposal, fitness: float | None) -> None:
        if clause := self._axes.problem(proposal.params):
            raise foreign_history(self.name, proposal, clause)
        try:
            notes = json.loads(proposal.token)
            trial_notes, study_notes = dict(notes["trial"]), dict(notes["study"])
        except (ValueError, KeyError, TypeError):
            raise foreign_history(self.name, proposal, "its token is not one of this optimizer") from None
        state, values = self._outcome(proposal.params, fitness)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=values,
                params={p.name: proposal.params[p.name] for p in self._axes.parameters},
                distributions=self._distributions,
                system_attrs=trial_notes,
            )
        )
        for key, value in study_notes.items():
            self._storage.set_study_system_attr(self._id, key, value)

    def _sampler(self, *key: int) -> optuna.samplers.BaseSampler:
        # One seed is one quasi-random sequence: only its position may change between asks.
        changing = self._class is not optuna.samplers.QMCSampler
        seed = component_seed(self._seed, *(key if changing else ()))
        try:
            sampler: optuna.samplers.BaseSampler = self._class(**self._arguments, seed=seed)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer `{self.name}`: {error}; change its options") from error
        return sampler

    def _asked(self, sampler: optuna.samplers.BaseSampler, fixed: Params | None) -> optuna.trial.FrozenTrial:
        self._study.sampler = sampler
        if fixed is not None:
            self._study.enqueue_trial(dict(fixed))
        self._study.ask(self._distributions)
        if fixed is not None and isinstance(sampler, optuna.samplers.BaseGASampler):
            # With all parameters fixed nothing is sampled, and a genetic algorithm, not having been asked,
            # would count the trial to no generation and never make it a parent.
            sampler.get_trial_generation(self._study, self._study.get_trials(deepcopy=False)[-1])
        return self._study.get_trials(deepcopy=False)[-1]

    def _finish(self, trial: optuna.trial.FrozenTrial, fitness: float | None) -> None:
        state, values = self._outcome(trial.params, fitness)
        # Not `Study.tell`: a replay cannot repeat its `after_trial`, where the samplers used here do nothing.
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        self._storage.set_trial_state_values(trial_id, state, values)

    def _outcome(self, params: Params, fitness: float | None) -> tuple[TrialState, list[float] | None]:
        """How a proposal ends in the study.

        Samplers overlook failed trials and would ask at the same place again, so a missing fitness is told
        as the worst so far; only while there is none yet does the trial fail.
        """
        self._seen.add(self._axes.indices(params))
        if fitness is not None:
            self._worst = min(self._worst, fitness)
            return TrialState.COMPLETE, [float(fitness)]
        if math.isinf(self._worst):
            return TrialState.FAIL, None
        return TrialState.COMPLETE, [self._worst]


def is_sampler(name: str) -> bool:
    """Whether `name` is a short or a class name of an Optuna sampler, usable here or not."""
    found = getattr(optuna.samplers, SAMPLERS.get(name, name), None)
    return (
        inspect.isclass(found)
        and issubclass(found, optuna.samplers.BaseSampler)
        and not inspect.isabstract(found)
    )


def sampler_class(name: str) -> Any:
    """The class of a name that `is_sampler`; raises `ConfigError` for one that cannot be used here."""
    class_name = SAMPLERS.get(name, name)
    if class_name in REFUSED:
        raise ConfigError(f"optimizer `{name}` cannot be used here: {REFUSED[class_name]}")
    for package in NEEDS.get(class_name, ()):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"optimizer `{name}` needs {package}, which is not installed; install it or use `tpe`"
            )
    return getattr(optuna.samplers, class_name)


def _arguments(
    name: str, cls: Any, axes: Axes, population_size: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    accepted = set(inspect.signature(cls).parameters)
    check_options(name, options, accepted - NOT_OPTIONS)
    if "seed" not in accepted:
        raise ConfigError(
            f"optimizer `{name}` cannot be used here: it takes no seed, so a run could not be repeated"
        )
    if cls is optuna.samplers.BruteForceSampler and axes.floats:
        raise ConfigError(
            f"optimizer `{name}` tries every combination, but `{axes.floats[0].name}` is a real parameter; "
            "use `qmc`, or give it named values"
        )
    arguments = dict(DEFAULTS.get(cls.__name__, {})) | dict(options)
    if population_size is not None:
        if "population_size" not in accepted:
            raise ConfigError(f"optimizer `{name}` has no population; remove `population_size`")
        arguments["population_size"] = population_size
    return arguments


def _distributions(axes: Axes) -> dict[str, BaseDistribution]:
    floats = {p.name: FloatDistribution(p.low, p.high) for p in axes.floats}
    choices = {c.name: CategoricalDistribution(c.choices) for c in axes.categoricals}
    return {p.name: (floats | choices)[p.name] for p in axes.parameters}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside only, silence Optuna's log below errors and its notices about experimental or old features."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
