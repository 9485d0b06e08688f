"""Score the recipe that an engine holds: items to requests, answers back to item scores.

All generation items of all tasks go into one `generate` call and all references into one `loglikelihood`
call, so that the engine can batch as it likes.

Imports: `evomerge.errors`, `engine.base`, other modules of `evaluate`; never torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.engine.base import Completion, Engine, GenerateRequest, Likelihood, LikelihoodRequest
from evomerge.errors import EngineError, FitnessError, RecipeError
from evomerge.evaluate.items import Item, Split
from evomerge.evaluate.score import ItemScore
from evomerge.evaluate.scorers import Choice, GenerationScorer, LikelihoodScorer
from evomerge.evaluate.task import Suite, Task
from evomerge.yamlfile import suggestion


def subset(suite: Suite, split: Split, per_task: int | None = None) -> list[Item]:
    """The first `per_task` items of every task in `split` (None: all), task after task.

    Raises:
        HeldOutError: `split` is held_out and the suite is sealed.
        FitnessError: `per_task` is below 1.
    """
    if per_task is not None and per_task < 1:
        raise FitnessError(f"{per_task} items per task were asked for, but it must be at least 1")
    return [item for task in suite.tasks for item in suite.items(task, split)[:per_task]]


def evaluate(engine: Engine, suite: Suite, items: Sequence[Item]) -> list[ItemScore]:
    """The scores of `items`, in their order, for the recipe loaded in `engine`.

    Raises:
        RecipeError: a log-likelihood is not a number: the merged weights overflow.
        EngineError: the engine failed, or gave fewer or more answers than it was asked for.
        FitnessError: an item of an unknown task, or the user's own scorer failed.
    """
    for item in items:
        if item.task not in suite.tasks:
            raise FitnessError(
                f"{suite.path}: item `{item.id}` is of task `{item.task}`, which the suite has not got; "
                f"{suggestion(item.task, suite.tasks)}"
            )
    completions = iter(_complete(engine, suite, items))
    likelihoods = iter(_likelihoods(engine, suite, items))
    result = []
    for item in items:
        scorer = suite.tasks[item.task].scorer
        if isinstance(scorer, GenerationScorer):
            completion = next(completions)
            value = scorer(completion.text, item)
            result.append(ItemScore(item.task, item.id, value, completion.text, completion.tokens))
        elif isinstance(scorer, LikelihoodScorer):
            answers = [next(likelihoods) for _ in scorer.references(item)]
            result.append(_score_likelihoods(scorer, item, answers))
    return result


def generate_request(task: Task, item: Item) -> GenerateRequest:
    """What an engine is asked for an item of a task whose scorer reads a completion."""
    return GenerateRequest(
        item.prompt,
        task.max_tokens,
        task.chat,
        task.system,
        task.stop,
        task.temperature,
        task.top_p,
        task.seed_of(item.id),
    )


def _complete(engine: Engine, suite: Suite, items: Sequence[Item]) -> list[Completion]:
    requests = [
        generate_request(task, item)
        for item in items
        if isinstance((task := suite.tasks[item.task]).scorer, GenerationScorer)
    ]
    answers = engine.generate(requests) if requests else []
    _check_count("completions", len(answers), len(requests))
    return answers


def _likelihoods(engine: Engine, suite: Suite, items: Sequence[Item]) -> list[Likelihood]:
    requests = [
        LikelihoodRequest(item.prompt, _prefix(scorer, task, item) + reference, task.chat, task.system)
        for item in items
        if isinstance(scorer := (task := suite.tasks[item.task]).scorer, LikelihoodScorer)
        for reference in scorer.references(item)
    ]
    answers = engine.loglikelihood(requests) if requests else []
    _check_count("log-likelihoods", len(answers), len(requests))
    return answers


def _prefix(scorer: LikelihoodScorer, task: Task, item: Item) -> str:
    if scorer.prefix is not None:
        return scorer.prefix
    return "" if task.chat or not item.prompt or item.prompt[-1].isspace() else " "


def _check_count(what: str, got: int, asked: int) -> None:
    if got != asked:
        raise EngineError(f"the engine returned {got} {what} for {asked} requests; check the engine")


def _score_likelihoods(scorer: LikelihoodScorer, item: Item, answers: Sequence[Likelihood]) -> ItemScore:
    value = math.nan if any(math.isnan(answer.total) for answer in answers) else scorer(answers, item)
    if not math.isfinite(value):
        totals = ", ".join(str(answer.total) for answer in answers)
        raise RecipeError(
            f"task `{item.task}`, item `{item.id}`: log-likelihoods are {totals}, so the merged model "
            "overflows; narrow the weights' range in the search space"
        )
    text = item.choices[scorer.chosen(answers, item)] if isinstance(scorer, Choice) else ""
    return ItemScore(item.task, item.id, value, text, sum(answer.tokens for answer in answers))
