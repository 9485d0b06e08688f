"""The outer loop: ask, decode, evaluate, record, tell. `Study.run` is the function to point at.

Imports: `space`, `search`, `study`, `evaluate`, `engine.base`; never torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.errors import EngineError, EvomergeError, RecipeError
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.items import Item
from evomerge.evaluate.score import ItemScore, Score, aggregate, score_tasks
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe
from evomerge.search import make_optimizer
from evomerge.search.base import Optimizer, Parameter, Params, Proposal, Start
from evomerge.space import BoundSpace
from evomerge.study.budget import Budget, Spent, used
from evomerge.study.fixed import FixedRecipe
from evomerge.study.scoring import Scorebook, Scored
from evomerge.study.storage import TrialLog
from evomerge.study.trial import FIXED, Outcome, Trial

MOST_KNOWN = 20  # best trials of earlier stages that an optimizer is told of, beside the fixed recipes
MOST_FAILURES = 5  # FAILED trials in a row after which the run stops instead of spending the night on them


@dataclass(frozen=True)
class Stage:
    """One stage of the search, from coarse to fine.

    Attributes:
        name: unique within the run.
        space: what it searches.
        sigma: standard deviation of its first proposals, in units of each parameter's range.
        until: share of the search's budget at which it ends, in (0, 1]; the last stage has 1.
    """

    name: str
    space: BoundSpace
    sigma: float
    until: float


@dataclass(frozen=True)
class Plan:
    """What a study does, apart from its engine and its storage.

    Attributes:
        fixed: recipes to score before the search.
        stages: at least one.
        optimizer: name of the optimizer, with its `population_size` and `options`.
        seed: root of all randomness of the search.
        budget: limits of the run.
        screen: items per task on which fixed recipes are first scored; None scores all of them in full.
        promote: how many of the screened recipes are then scored on every calibration item.
        reserve: seconds needed after the search; called with the seconds that an item took so far.
    """

    fixed: tuple[FixedRecipe, ...]
    stages: tuple[Stage, ...]
    optimizer: str
    budget: Budget
    seed: int = 0
    population_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    screen: int | None = None
    promote: int = 5
    reserve: Callable[[float], float] = lambda seconds_per_item: 0.0


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
        self.plan, self.suite, self.book, self.log = plan, suite, book, log
        self._observer = observer or Observer()
        begun = time.monotonic() - (log.trials[-1].elapsed if len(log) else 0.0)
        self.clock = clock or (lambda: time.monotonic() - begun)
        self._items: list[Item] = subset(suite, "calibration")
        self._fixed = {fixed.label: fixed for fixed in plan.fixed}
        for trial in log:
            book.remember(trial.digest, trial.record)

    def run(self) -> Trial:
        """Search until the budget is spent; return the incumbent.

        Safe to call again after any interruption: recorded trials are told to the optimizer again, and
        the first one that is missing is proposed as it would have been.

        Raises:
            EngineError: `MOST_FAILURES` trials in a row failed, or nothing could be scored at all.
            StorageError: a trial could not be recorded.
        """
        self._score_fixed()
        for index, stage in enumerate(self.plan.stages):
            self._observer.begin(self, stage.name)
            restart = 0
            while not self._over(stage, index):
                optimizer = self._optimizer(stage, restart)
                while not self._over(stage, index) and not optimizer.should_stop():
                    proposal = optimizer.ask()
                    trial = self._evaluate(proposal, stage, restart)
                    optimizer.tell(proposal, trial.told)
                if not any((t.stage, t.restart) == (stage.name, restart) for t in self.log):
                    break  # nothing is left to propose in this space
                restart += 1
        return self.incumbent

    @property
    def incumbent(self) -> Trial:
        """The complete trial of largest fitness, the earliest among equals.

        Raises:
            EngineError: no trial is complete.
        """
        trial = best_trial(self.log)
        if trial is None:
            raise EngineError("no recipe could be scored; see the trials' errors with `evomerge status`")
        return trial

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe that a trial evaluated."""
        if trial.stage == FIXED:
            return self._fixed[trial.label].recipe
        stage = next(stage for stage in self.plan.stages if stage.name == trial.stage)
        return stage.space.decode(trial.params)

    @property
    def spent(self) -> Spent:
        """Trials, seconds and item evaluations so far."""
        return Spent(len(self.log), self.clock(), sum(t.items for t in self.log))

    @property
    def share_used(self) -> float:
        """Share of the search's budget that is used; 0 while the fixed recipes are scored."""
        fixed = [trial for trial in self.log if trial.stage == FIXED]
        if not fixed:
            return 0.0
        start = Spent(len(fixed), fixed[-1].elapsed, sum(t.items for t in fixed))
        return used(self.plan.budget, start, self.spent, self.plan.reserve(self.seconds_per_item))

    @property
    def seconds_per_item(self) -> float:
        """Mean seconds per item evaluation so far, merging included; 0 before the first."""
        items = sum(t.items for t in self.log)
        return sum(t.merge_seconds + t.evaluate_seconds for t in self.log) / items if items else 0.0

    def _over(self, stage: Stage, index: int) -> bool:
        """Whether a stage has used its share, or a later one was already begun before an interruption."""
        later = {s.name for s in self.plan.stages[index + 1 :]}
        return self.share_used >= stage.until or (len(self.log) > 0 and self.log.trials[-1].stage in later)

    def _optimizer(self, stage: Stage, restart: int) -> Optimizer:
        """The stage's optimizer, brought to where its recorded trials left it."""
        mine = [t for t in self.log if (t.stage, t.restart) == (stage.name, restart)]
        before = self.log.trials[: mine[0].number] if mine else self.log.trials
        optimizer = make_optimizer(
            self.plan.optimizer,
            stage.space.parameters,
            seed=self.plan.seed + 1000 * restart + self.plan.stages.index(stage),
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
        known: list[tuple[Params, float]] = []
        ranked = sorted((t for t in before if t.told is not None), key=lambda t: -_fitness(t))
        for trial in ranked:
            if trial.stage == FIXED or trial in ranked[:MOST_KNOWN]:
                recipe = self.recipe_of(trial)
                params: Params = stage.space.encode(recipe)
                if trial.told is not None and _digest(stage.space, params) == recipe.digest:
                    known.append((params, trial.told))
        start = stage.space.encode(self.recipe_of(incumbent))
        return Start(start, stage.sigma, tuple(known))

    def _evaluate(self, proposal: Proposal, stage: Stage, restart: int) -> Trial:
        """Decode and score one proposal, and record the trial."""
        common = {
            "stage": stage.name,
            "restart": restart,
            "params": proposal.params,
            "token": proposal.token,
        }
        try:
            recipe = stage.space.decode(proposal.params)
        except RecipeError as error:
            scored = Scored(Outcome.INFEASIBLE, error=str(error))
            return self._record(scored, stage.space.parameters, **common)
        scored = self.book.score(recipe, self._items, self._record_name(recipe))
        return self._record(scored, stage.space.parameters, digest=recipe.digest, **common)

    def _record(self, scored: Scored, parameters: Sequence[Parameter] = (), **fields: Any) -> Trial:
        values: dict[str, Any] = {"outcome": scored.outcome, **fields}
        if scored.scores:
            scores, (fitness, stderr) = self.fitness(scored.scores)
            values |= {"scores": scores, "fitness": fitness, "stderr": stderr}
        trial = Trial(
            number=len(self.log),
            record=scored.record,
            items=scored.items,
            merge_seconds=scored.merge_seconds,
            evaluate_seconds=scored.evaluate_seconds,
            elapsed=round(self.clock(), 3),
            error=scored.error,
            **values,
        )
        self.log.add(trial, parameters)
        self._observer.trial(self, trial)
        recent = self.log.trials[-MOST_FAILURES:]
        if len(recent) == MOST_FAILURES and all(t.outcome is Outcome.FAILED for t in recent):
            raise EngineError(
                f"the last {MOST_FAILURES} trials failed, the last one with: {trial.error}. "
                "Mend the machine and go on with `evomerge resume`; finished trials are kept"
            )
        return trial

    def fitness(
        self, item_scores: Iterable[ItemScore]
    ) -> tuple[Mapping[str, Score], tuple[float, float | None]]:
        """Scores per task, and the fitness with its standard error."""
        scores = score_tasks(item_scores)
        fitness = aggregate(scores, self.suite.weights, self.suite.aggregate, self.best_source())
        return scores, (fitness.value, fitness.stderr)

    def best_source(self) -> Mapping[str, float] | None:
        """Each task's score of its best source: what `normalized` divides by. None for other aggregates."""
        if self.suite.aggregate != "normalized":
            return None
        sources = [t for t in self.log if t.label and self._fixed[t.label].kind == "source"]
        return {
            task: max((t.scores[task].mean for t in sources if task in t.scores), default=0.0)
            for task in self.suite.tasks
        }

    def _record_name(self, recipe: Recipe) -> str:
        return f"calibration/{len(self.log):06d}-{recipe.digest[:12]}"

    def _score_fixed(self) -> None:
        """Score base and sources in full, the other fixed recipes in part, the best of those in full."""
        self._observer.begin(self, FIXED)
        done = {(t.label, t.outcome is Outcome.PRUNED) for t in self.log if t.stage == FIXED}
        screened: list[FixedRecipe] = []
        for fixed in self.plan.fixed:
            screen = fixed.kind == "fixed" and self.plan.screen is not None
            if screen:
                screened.append(fixed)
            if (fixed.label, screen) not in done and (fixed.label, False) not in done:
                self._score_one(fixed, part=screen)
        part = {t.label: t for t in self.log if t.outcome is Outcome.PRUNED}
        order = sorted(screened, key=lambda f: -_fitness(part.get(f.label)))
        for fixed in order[: self.plan.promote]:
            if fixed.label in part and (fixed.label, False) not in done:
                self._score_one(fixed, part=False)

    def _score_one(self, fixed: FixedRecipe, *, part: bool) -> None:
        items = self._items
        if part and self.plan.screen is not None:
            items = subset(self.suite, "calibration", self.plan.screen)
        scored = self.book.score(fixed.recipe, items, self._record_name(fixed.recipe))
        whole = len(items) == len(self._items)
        outcome = scored.outcome if whole or not scored.scores else Outcome.PRUNED
        scored = replace(scored, outcome=outcome)
        self._record(scored, stage=FIXED, label=fixed.label, digest=fixed.recipe.digest)


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The complete trial of largest fitness, the earliest among equals; None when there is none."""
    return max(
        (t for t in trials if t.told is not None), key=lambda t: (_fitness(t), -t.number), default=None
    )


def _fitness(trial: Trial | None) -> float:
    return trial.fitness if trial is not None and trial.fitness is not None else float("-inf")


def _digest(space: BoundSpace, params: Params) -> str:
    try:
        return space.decode(params).digest
    except EvomergeError:
        return ""
