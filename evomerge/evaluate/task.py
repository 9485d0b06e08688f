"""Fitness suites: the tasks of a YAML file, their items in three splits, the held-out one sealed.

Everything that can be wrong with a suite is found when it is loaded, before a model is. Held-out items
can be read only inside `with suite.unsealed():`, which the search never enters; that no prompt of theirs
stands in another split is checked at loading.

Imports: `evomerge.errors`, `evomerge.yamlfile`, other modules of `evaluate`; never torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
from pydantic import Field

from evomerge.errors import ConfigError, FitnessError, HeldOutError
from evomerge.evaluate.items import SPLITS, Item, Split, check_split, compile_prompt, read_items
from evomerge.evaluate.score import Aggregate
from evomerge.evaluate.scorers import LikelihoodScorer, Scorer, make_scorer
from evomerge.yamlfile import Section, load_yaml, suggestion, validate

FORMAT = 1  # part of the digest; raise it when a change to this package changes scores


class TaskSection(Section):
    """One task of the YAML file.

    Attributes:
        data: JSONL, relative to the YAML file: one path or a list (each row names its split), or a
            mapping of split to path.
        prompt: jinja2 template over the fields of an item.
        chat: put the prompt into the model's chat template as the user's message.
        system: system message; only with `chat`.
        scorer: name of a scorer, or a mapping of `type` and options.
        max_tokens: most new tokens of a completion, at least 1.
        stop: texts that end a completion.
        temperature, top_p, seed: for answers that are drawn; by default the likeliest is taken. Every item
            has a seed of its own, the same for every candidate.
        weight: share in the fitness, above 0; weights need not sum to 1.
    """

    data: str | list[str] | dict[Split, str]
    prompt: str
    chat: bool = False
    system: str | None = None
    scorer: str | dict[str, Any]
    max_tokens: int = Field(16, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)
    weight: float = Field(1.0, gt=0)


class SuiteSection(Section):
    """A suite's YAML file; `aggregate` says how task scores become one fitness (see `score.aggregate`)."""

    description: str = ""
    aggregate: Aggregate = "mean"
    tasks: dict[str, TaskSection] = Field(min_length=1)


@dataclass(frozen=True)
class Task:
    """How the items of a task are asked and scored; attributes as in `TaskSection`."""

    name: str
    scorer: Scorer
    weight: float
    chat: bool
    system: str | None
    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    seed: int

    def seed_of(self, item: str) -> int:
        """Seed of the draws for one item, in [0, 2**31)."""
        text = f"{self.seed}\0{self.name}\0{item}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


class Suite:
    """Tasks and items that together give a recipe its fitness; made by `load`.

    Attributes:
        path: the YAML file.
        description: what the suite measures.
        aggregate: mean, min or normalized.
        tasks: by name, in the order of the file.
        weights: weight by task.
        digest: 64 hexadecimal digits over everything that influences scores: items after limits, their
            order, prompts, answers, scorers, weights. Not the paths or the description.
    """

    def __init__(
        self,
        path: Path,
        section: SuiteSection,
        tasks: Mapping[str, Task],
        items: Mapping[tuple[str, Split], tuple[Item, ...]],
    ) -> None:
        self.path = path
        self.description = section.description
        self.aggregate = section.aggregate
        self.tasks = dict(tasks)
        self.weights = {name: task.weight for name, task in tasks.items()}
        self._items = dict(items)
        self._unsealed = 0
        self.digest = self._digest(section)

    @classmethod
    def load(cls, path: str | Path, limits: Mapping[str, int] | None = None) -> Suite:
        """Read and check the suite at `path`.

        Args:
            limits: per split, how many items of each task to keep, the first in the order of the file;
                splits that are not named keep all.

        Raises:
            ConfigError: the YAML file, a scorer, a template or `limits` is wrong.
            FitnessError: an item is wrong, a split has no item, one id occurs twice in a task, or one
                prompt stands in two splits.
        """
        path = Path(path)
        section = validate(SuiteSection, load_yaml(path), path)
        for split, limit in (limits or {}).items():
            check_split(split, f"{path}: limits", ConfigError)
            if limit < 1:
                raise ConfigError(
                    f"{path}: the limit of split `{split}` is {limit}, but it must be at least 1"
                )
        prepared = {name: _prepare(name, part, path) for name, part in section.tasks.items()}
        items: dict[tuple[str, Split], tuple[Item, ...]] = {}
        prompts: dict[tuple[str, ...], tuple[str, Item]] = {}
        for name, (task, template) in prepared.items():
            for_split = _read_task(task, section.tasks[name], template, path, prompts)
            for split in SPLITS:
                items[name, split] = tuple(for_split[split][: (limits or {}).get(split)])
        return cls(path, section, {name: task for name, (task, _) in prepared.items()}, items)

    def items(self, task: str, split: Split) -> tuple[Item, ...]:
        """The items of a task in a split, in the order of the file.

        Raises:
            HeldOutError: `split` is held_out and the suite is sealed.
            FitnessError: no such task or split.
        """
        if task not in self.tasks:
            raise FitnessError(f"{self.path}: no task `{task}`; {suggestion(task, self.tasks)}")
        split = check_split(split, str(self.path), FitnessError)
        if split == "held_out" and not self._unsealed:
            raise HeldOutError(
                f"{self.path}: held-out items of task `{task}` were read while they are sealed; "
                "only the final report may read them, inside `with suite.unsealed():`"
            )
        return self._items[task, split]

    @contextmanager
    def unsealed(self) -> Iterator[None]:
        """Held-out items may be read inside this block; blocks may be nested."""
        self._unsealed += 1
        try:
            yield
        finally:
            self._unsealed -= 1

    def sizes(self) -> dict[str, dict[Split, int]]:
        """Number of items by task and split; needs no unsealing."""
        return {name: {split: len(self._items[name, split]) for split in SPLITS} for name in self.tasks}

    def _digest(self, section: SuiteSection) -> str:
        hasher = hashlib.sha256(json.dumps([FORMAT, self.aggregate]).encode())
        for name in sorted(self.tasks):
            asked = section.tasks[name].model_dump(mode="json", exclude={"data", "prompt", "scorer"})
            scorer = self.tasks[name].scorer
            hasher.update(
                json.dumps([name, asked, type(scorer).__name__, scorer.identity()], sort_keys=True).encode()
            )
            for split in SPLITS:
                for item in self._items[name, split]:
                    row = [item.id, split, item.prompt, item.answer, item.choices, item.fields]
                    hasher.update(json.dumps(row, sort_keys=True).encode())
        return hasher.hexdigest()


def _prepare(name: str, section: TaskSection, path: Path) -> tuple[Task, jinja2.Template]:
    scorer = make_scorer(section.scorer, str(path), ("tasks", name, "scorer"))
    if section.system is not None and not section.chat:
        raise ConfigError(f"{path}: `tasks.{name}.system` is set, but `chat` is false; set `chat: true`")
    template = compile_prompt(section.prompt, f"{path}: `tasks.{name}.prompt`")
    asked = section.model_dump(exclude={"data", "prompt", "scorer"})
    return Task(name, scorer, **asked), template


def _read_task(
    task: Task,
    section: TaskSection,
    template: jinja2.Template,
    path: Path,
    prompts: dict[tuple[str, ...], tuple[str, Item]],
) -> dict[Split, list[Item]]:
    """Items by split; `prompts` collects where each prompt of the suite was first seen."""
    files: list[tuple[Split | None, str]]
    if isinstance(section.data, dict):
        files = list(section.data.items())
    else:
        files = [(None, name) for name in ([section.data] if isinstance(section.data, str) else section.data)]
    result: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    for split, name in files:
        for where, item in read_items(path.parent / name, task.name, template, split):
            if item.id in seen:
                raise FitnessError(
                    f"{where}: id `{item.id}` was given to the item at {seen[item.id]} already; "
                    "ids must be unique in a task"
                )
            seen[item.id] = where
            _check_item(task, item, where, prompts)
            result[item.split].append(item)
    for split in SPLITS:
        if not result[split]:
            raise FitnessError(
                f"{path}: task `{task.name}` has no item in split `{split}`; add items to "
                f"{', '.join(name for _, name in files) or 'its data'}"
            )
    return result


def _check_item(task: Task, item: Item, where: str, prompts: dict[tuple[str, ...], tuple[str, Item]]) -> None:
    try:
        task.scorer.check(item)
    except ValueError as error:
        raise FitnessError(
            f"{where}: item `{item.id}` of task `{task.name}`: {error}; correct the item or the scorer"
        ) from error
    # Two likelihood items may share a prompt ("" before whole texts): the references tell them apart.
    references = task.scorer.references(item) if isinstance(task.scorer, LikelihoodScorer) else ()
    first_where, first = prompts.setdefault((item.prompt, *references), (where, item))
    if first.split != item.split:
        raise FitnessError(
            f"{where}: item `{item.id}` (task `{item.task}`, split `{item.split}`) has the same prompt as "
            f"item `{first.id}` (task `{first.task}`, split `{first.split}`) at {first_where}; splits "
            "must be disjoint, so remove one of them"
        )
