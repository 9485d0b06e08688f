"""Search: what to try next, knowing only parameters and the fitness of what was tried.

Four nouns. A **parameter** is a number in a range or one of some named values. A **proposal** is one value
per parameter. An **optimizer** is asked for a proposal and told its fitness, in turns; larger is better, and
None means that a proposal has no fitness. A **start** is the point to begin at, how far to look around it at
first, and points whose fitness is known already.

    optimizer = make_optimizer("cma", parameters, seed=0, start=Start({"w": 0.5}))
    optimizer.replay(history)  # after an interruption: the (proposal, fitness) pairs so far
    while not optimizer.should_stop():
        proposal = optimizer.ask()
        optimizer.tell(proposal, evaluate(proposal.params))

Which optimizer: `cma` for real parameters and some hundred evaluations or more; `mixed` when a method is
chosen as well; `tpe` or `gp` for few evaluations; `random` and `qmc` to compare with. No optimizer reads or
writes a global random generator, and none keeps state that a replay does not rebuild.

Modules: `base` (the protocol), `axes` (parameters as vectors; checks), `turns` (ask, tell, replay),
`generations` (populations), and one module per library: `cma`, `mixed`, `optuna_samplers`. A library is
imported when an optimizer of it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import ConfigError
from evomerge.search.axes import Axes, check_start, did_you_mean
from evomerge.search.base import (
    CategoricalParameter,
    FloatParameter,
    Optimizer,
    Parameter,
    Params,
    Proposal,
    Start,
    Told,
    Value,
)

__all__ = [
    "OPTIMIZERS",
    "CategoricalParameter",
    "FloatParameter",
    "Optimizer",
    "Parameter",
    "Params",
    "Proposal",
    "Start",
    "Told",
    "Value",
    "make_optimizer",
]

OPTIMIZERS: Mapping[str, str] = {
    "cma": "CMA-ES: real parameters, up to some hundred of them",
    "mixed": "CatCMA with margin: real and categorical parameters together",
    "tpe": "tree-structured Parzen estimator: any parameters, few evaluations",
    "gp": "Gaussian process: any parameters, very few evaluations; needs torch and scipy",
    "nsga2": "NSGA-II: a genetic algorithm, any parameters",
    "nsga3": "NSGA-III: a genetic algorithm, any parameters",
    "random": "uniform draws: the baseline",
    "qmc": "a scrambled Sobol sequence: spreads more evenly than uniform draws",
    "brute_force": "every combination of categorical parameters once",
}
"""Name and use of each optimizer; any other Optuna sampler goes by its class name."""


def make_optimizer(
    name: str,
    parameters: Sequence[Parameter],
    *,
    seed: int,
    start: Start,
    population_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """A fresh optimizer.

    Args:
        name: a key of `OPTIMIZERS`, or the class name of an Optuna sampler.
        parameters: what to vary; names are unique.
        seed: 0 or more; with the other arguments it determines every proposal.
        start: where to begin. `cma` and `mixed` draw around it and seat known points in their first
            generation (a sigma above 1/3 acts as 1/3 in `cma`); Optuna's samplers get known points as
            finished trials and do not use sigma. The first proposal is the start itself, unless its fitness
            is known.
        population_size: proposals per generation of `cma` and `mixed` (4 or more), `nsga2` and `nsga3`; None
            for the library's own.
        options: of the library behind `name`; None for none.

    Raises:
        ConfigError: an argument is wrong, or the optimizer cannot search these parameters.
    """
    axes = Axes(parameters)
    check_start(axes, start)
    if seed < 0:
        raise ConfigError(f"the seed is {seed}, but must be 0 or more")
    if name == "cma":
        from evomerge.search.cma import CmaOptimizer

        return CmaOptimizer(axes, seed=seed, start=start, population_size=population_size, options=options)
    if name == "mixed":
        from evomerge.search.mixed import MixedOptimizer

        return MixedOptimizer(axes, seed=seed, start=start, population_size=population_size, options=options)
    from evomerge.search.optuna_samplers import OptunaOptimizer, is_sampler

    if not is_sampler(name):
        raise ConfigError(
            f"there is no optimizer `{name}`{did_you_mean(name, OPTIMIZERS)}; "
            f"there are {', '.join(OPTIMIZERS)}, and Optuna's samplers by class name"
        )
    return OptunaOptimizer(
        name, axes, seed=seed, start=start, population_size=population_size, options=options
    )
