"""The outer loop: ask, decode, evaluate, record, tell. `Study.run` is the function to point at.

Imports: `space`, `search`, `study`, `evaluate`, `engine.base`; never torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from evomerge.errors import EngineError, EvomergeError, RecipeError
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe
from evomerge.search import make_optimizer
from evomerge.search.axes import component_seed
from evomerge.search.base import Optimizer, Params, Proposal, Start
from evomerge.space import BoundSpace
from evomerge.study.baselines import Baselines
from evomerge.study.budget import Spent, used
from evomerge.study.plan import Plan, Stage
from evomerge.study.recorder import Recorder
from evomerge.study.scoring import Scorebook, Scored
from evomerge.study.storage import TrialLog
from evomerge.study.totals import best_trial, fitness
from evomerge.study.trial import FIXED, Outcome, Trial

__all__ = ["Observer", "Plan", "Stage", "Study", "best_trial"]

MOST_KNOWN = 20  # best trials of earlier stages that an optimizer is told of, beside the fixed recipes
MOST_IDLE = 200  # proposals in a row that ask no item, after which a stage has nothing more to find


class Observer:
    """Told what a study does; every method may be overridden, none need be."""

    def begin(self, study: Study, stage: str) -> None:
        """A stage begins or goes on."""

    def trial(self, study: Study, trial: Trial) -> None:
        """A trial has been recorded."""


class Study:
    """Searches for the recipe with the largest calibration fitness.

    Args:
        plan: what to do.
        suite: the tasks; only its calibration items are read here.
        book: scores recipes.
        log: the record of trials; a non-empty one is gone on from.
        observer: told of every stage and trial.
        clock: seconds since the run began, across restarts.

    Raises:
        FitnessError: a split of a task has fewer items than the final comparison needs.
    """

    def __init__(
        self,
        plan: Plan,
        suite: Suite,
        book: Scorebook,
        log: TrialLog,
        observer: Observer | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.plan, self.suite, self.log = plan, suite, log
        self._observer = observer or Observer()
        self._fixed = {fixed.label: fixed for fixed in plan.fixed}
        begun = time.monotonic()
        self._recorder = Recorder(
            suite, book, log, lambda: self.clock(), lambda trial: self._observer.trial(self, trial)
        )
        self._totals = self._recorder.totals
        before = self._totals.last.elapsed if self._totals.last else 0.0
        self.clock = clock or (lambda: before + time.monotonic() - begun)

    def run(self) -> Trial:
        """Search until the budget is spent; return the incumbent.

        After any interruption a new study over the same log goes on: recorded trials are told to the
        optimizer again, and the first one that is missing is proposed as it would have been. The fixed
        recipes are scored whatever the budget; where they use all of it, no search follows.

        Raises:
            EngineError: too many trials in a row failed, or nothing could be scored at all.
            StorageError: a trial could not be recorded.
        """
        self._observer.begin(self, FIXED)
        Baselines(self.plan, self._recorder).score()
        for index, stage in enumerate(self.plan.stages):
            if self._over(index) or not self._chosen(stage):
                continue
            self._observer.begin(self, stage.name)
            restart = self._totals.restarts.get(stage.name, 0)
            while not self._over(index):
                optimizer = self._optimizer(stage, restart)
                while not self._over(index) and not optimizer.should_stop():
                    proposal = optimizer.ask()
                    trial = self._evaluate(proposal, stage, restart)
                    optimizer.tell(proposal, trial.told)
                if self._totals.restarts.get(stage.name, -1) < restart:
                    break  # the optimizer had nothing to propose from the start
                restart += 1
            if self._idle(stage):
                self._recorder.book.warn(
                    f"{stage.name}: {MOST_IDLE} proposals in a row were known; it ends here"
                )
        return self.incumbent

    @property
    def best(self) -> Trial | None:
        """The incumbent; None while no trial is complete."""
        return self._totals.best

    @property
    def incumbent(self) -> Trial:
        """The complete trial of largest fitness, the earliest among equals.

        Raises:
            EngineError: no trial is complete.
        """
        if self._totals.best is None:
            raise EngineError("no recipe could be scored; see the trials' errors with `evomerge status`")
        return self._totals.best

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe that a trial evaluated."""
        if trial.stage == FIXED:
            return self._fixed[trial.label].recipe
        stage = next(stage for stage in self.plan.stages if stage.name == trial.stage)
        return stage.space.decode(trial.params)

    @property
    def spent(self) -> Spent:
        """Trials, seconds and item evaluations so far."""
        return Spent(self._totals.trials, self.clock(), self._totals.items)

    @property
    def share_used(self) -> float:
        """Share of the search's budget that is used; 0 before a fixed recipe is recorded."""
        if self._totals.fixed is None:
            return 0.0
        reserve = self.plan.reserve(self.seconds_per_item)
        return used(self.plan.budget, self._totals.fixed, self.spent, reserve)

    @property
    def seconds_per_item(self) -> float:
        """Mean seconds per item evaluation so far, merging included; 0 before the first."""
        return self._totals.work / self._totals.items if self._totals.items else 0.0

    @property
    def best_source(self) -> Mapping[str, float] | None:
        """Each task's score of its best source: what `normalized` divides by. None for other aggregates."""
        return self._recorder.best_source

    def _over(self, index: int) -> bool:
        """Whether a stage has used its share, finds nothing new, or gave way to a later one before."""
        stage, last = self.plan.stages[index], self._totals.last
        later = last is not None and any(last.stage == s.name for s in self.plan.stages[index + 1 :])
        return later or self._idle(stage) or self.share_used >= stage.until

    def _chosen(self, stage: Stage) -> bool:
        """Whether a stage is the one of its slot that is searched."""
        rivals = [s for s in self.plan.stages if s is stage or (s.slot == stage.slot and s.slot is not None)]
        begun = [s for s in rivals if s.name in self._totals.restarts]
        if len(rivals) == 1 or begun:
            return stage in (begun or rivals)
        recipe = self.recipe_of(self.incumbent)
        exact = (s for s in rivals if _digest(s.space, s.space.encode(recipe)) == recipe.digest)
        return stage is next(exact, rivals[0])

    def _idle(self, stage: Stage) -> bool:
        last = self._totals.last
        return last is not None and last.stage == stage.name and self._totals.idle >= MOST_IDLE

    def _optimizer(self, stage: Stage, restart: int) -> Optimizer:
        """The stage's optimizer, brought to where its recorded trials left it."""
        mine = [t for t in self.log if (t.stage, t.restart) == (stage.name, restart)]
        before = self.log.trials[: mine[0].number if mine else None]
        optimizer = make_optimizer(
            self.plan.optimizer,
            stage.space.parameters,
            seed=component_seed(self.plan.seed, self.plan.stages.index(stage), restart),
            start=self._start(stage, before),
            population_size=self.plan.population_size,
            options=self.plan.options,
        )
        optimizer.replay([(Proposal(i, t.params, t.token), t.told) for i, t in enumerate(mine)])
        return optimizer

    def _start(self, stage: Stage, before: Sequence[Trial]) -> Start:
        """Begin at the incumbent; tell of every other recipe that the stage's space can say exactly."""
        incumbent = best_trial(before)
        if incumbent is None:
            raise EngineError("none of the fixed recipes could be scored; see `evomerge status`")
        ranked = sorted((t for t in before if t.told is not None), key=fitness, reverse=True)
        best = {trial.digest: trial for trial in ranked[:MOST_KNOWN]}
        chosen = best | {trial.digest: trial for trial in ranked if trial.stage == FIXED}
        known: list[tuple[Params, float]] = []
        for trial in chosen.values():
            params = stage.space.encode(self.recipe_of(trial))
            if trial.told is not None and _digest(stage.space, params) == trial.digest:
                known.append((params, trial.told))
        return Start(stage.space.encode(self.recipe_of(incumbent)), stage.sigma, tuple(known))

    def _evaluate(self, proposal: Proposal, stage: Stage, restart: int) -> Trial:
        """Decode and score one proposal, and record the trial."""
        try:
            recipe = stage.space.decode(proposal.params)
        except RecipeError as error:
            scored = Scored(Outcome.INFEASIBLE, error=str(error))
        else:
            scored = self._recorder.score(recipe, self._recorder.items)
        return self._recorder.record(
            scored,
            stage.space.parameters,
            stage=stage.name,
            restart=restart,
            params=proposal.params,
            token=proposal.token,
        )


def _digest(space: BoundSpace, params: Params) -> str:
    try:
        return space.decode(params).digest
    except EvomergeError:
        return ""
