"""The run file: what a user writes to start a search. Every key is declared, with its default, here.

Relative paths count from the file that names them. Unknown keys are refused with the nearest valid one.

Imports: `errors`, `yamlfile`, `space`, `sources.reference`, `study.budget`; never torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from evomerge.errors import ConfigError
from evomerge.resources import find_resource
from evomerge.sources.reference import SourceRef, expand, looks_like_path
from evomerge.space import SearchSpace
from evomerge.yamlfile import FileSize, Section, load_yaml, validate


class Source(Section):
    """A source model: a folder or hub id under `model`, or a LoRA adapter's under `adapter`.

    `statistics` are files that `evomerge statistics` wrote, for the methods that need them.
    """

    model: str | None = None
    adapter: str | None = None
    revision: str | None = None
    statistics: str | tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.model is None) == (self.adapter is None):
            raise ValueError("give exactly one of `model` and `adapter`")
        return self

    def reference(self, folder: Path) -> SourceRef:
        """As a `SourceRef`; paths relative to `folder` become absolute."""
        given = {"model": self.model, "adapter": self.adapter}
        here = {key: _absolute(text, folder) for key, text in given.items() if text is not None}
        files = (self.statistics,) if isinstance(self.statistics, str) else self.statistics or ()
        beside = tuple(str((folder / expand(text)).resolve()) for text in files)
        return SourceRef(**here, revision=self.revision, statistics=beside)


class Items(Section):
    """Most items per task and split; null takes every item that the task has."""

    calibration: Annotated[int, Field(ge=1)] | None = None
    selection: Annotated[int, Field(ge=1)] | None = None
    held_out: Annotated[int, Field(ge=1)] | None = None


class EngineConfig(Section):
    """The engine that holds and runs candidates."""

    kind: Literal["auto", "transformers", "vllm"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    batch_tokens: Annotated[int, Field(ge=64)] = 8192
    cache_gb: Annotated[float, Field(ge=0)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    timeout: Annotated[float, Field(gt=0)] = 600.0


class FixedConfig(Section):
    """The fixed recipes that every run scores first."""

    scales: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    subset_scales: tuple[float, ...] = (0.5, 0.7, 1.0)
    screen_items: Annotated[int, Field(ge=1)] | None = 8
    promote: Annotated[int, Field(ge=1)] = 5


class StageConfig(Section):
    """One stage: its space, sigma and share of the budget.

    A space is a ready-made one's name, a path, or written out. Of a list, the first is searched that can
    say the best recipe so far exactly, so that a search begins at it whatever its method.
    """

    space: str | SearchSpace | Annotated[tuple[str | SearchSpace, ...], Field(min_length=1)]
    sigma: Annotated[float, Field(gt=0, le=1)] = 0.15
    share: Annotated[float, Field(gt=0)] = 1.0


DEFAULT_STAGES = (
    StageConfig(space=("global", "ties"), sigma=0.15, share=0.25),
    StageConfig(space=("modules", "ties_modules"), sigma=0.12, share=0.35),
    StageConfig(space=("blocks", "ties_blocks"), sigma=0.1, share=0.4),
)


class SearchConfig(Section):
    """Optimizer and stages."""

    optimizer: str = "cma"
    population_size: Annotated[int, Field(ge=2)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = DEFAULT_STAGES


class BudgetConfig(Section):
    """What the run may spend; at least one limit. The first that is reached ends the search."""

    trials: Annotated[int, Field(ge=1)] | None = None
    time: str | None = None
    item_evaluations: Annotated[int, Field(ge=1)] | None = None

    @field_validator("time")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            from datetime import datetime

            from evomerge.study.budget import seconds_of

            try:
                seconds_of(text, datetime.now())
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return text

    @model_validator(mode="after")
    def _some(self) -> BudgetConfig:
        if (self.trials, self.time, self.item_evaluations) == (None, None, None):
            raise ValueError("no limit is set; set `trials`, `time` (`8h`) or `item_evaluations`")
        return self


class SelectionConfig(Section):
    """How many of the search's best recipes meet on the selection items."""

    top: Annotated[int, Field(ge=1)] = 4


class ExportConfig(Section):
    """What is written besides the recipes."""

    model: bool = False
    max_shard_size: FileSize = ByteSize(5_000_000_000)


class RunConfig(Section):
    """A whole run file."""

    base_model: Source
    models: Annotated[dict[str, Source], Field(min_length=1)]
    fitness: str
    budget: BudgetConfig
    items: Items = Items()
    search: SearchConfig = SearchConfig()
    engine: EngineConfig = EngineConfig()
    fixed: FixedConfig = FixedConfig()
    selection: SelectionConfig = SelectionConfig()
    export: ExportConfig = ExportConfig()
    modules: dict[str, list[str]] = Field(default_factory=dict)
    storage: str | None = None
    run_dir: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, Source]) -> dict[str, Source]:
        for name in models:
            if name == "base" or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"model name {name!r} is not allowed; use letters, digits, `-` and `_`, and not `base`"
                )
        return models


class LoadedConfig:
    """A run file with its place: resolves what the file names.

    Attributes:
        config: the validated content.
        path: the run file.
        name: its stem: the study's name.
        run_dir: where the run writes: `run_dir` of the file, else a folder beside it with its stem.
    """

    def __init__(self, config: RunConfig, path: Path) -> None:
        self.config, self.path = config, path
        self.name = path.stem
        self.folder = path.resolve().parent
        self.run_dir = Path(_absolute(config.run_dir or f"./{self.name}", self.folder))

    def base(self) -> SourceRef:
        """The base model."""
        return self.config.base_model.reference(self.folder)

    def models(self) -> dict[str, SourceRef]:
        """The models by name."""
        return {name: source.reference(self.folder) for name, source in self.config.models.items()}

    def fitness(self) -> Path:
        """The task suite: a path, or the name of one that is shipped."""
        return find_resource("fitness", self.config.fitness, self.folder, f"{self.path}: `fitness`")

    def spaces(self, index: int) -> list[tuple[str, SearchSpace, str]]:
        """Each alternative of a stage: its name, its space, and where it was written, for messages."""
        given = self.config.search.stages[index].space
        where = f"{self.path}: `search.stages[{index}].space`"
        found = []
        for number, space in enumerate(given if isinstance(given, tuple) else (given,)):
            if isinstance(space, SearchSpace):
                found.append((f"{index + 1}" + chr(ord("a") + number) * (number > 0), space, where))
            else:
                path = find_resource("search_spaces", space, self.folder, where)
                read = validate(SearchSpace, load_yaml(path), str(path))
                found.append((f"{index + 1}:{path.stem}", read, str(path)))
        return found

    def frozen(self) -> dict[str, Any]:
        """Everything that a resumed run must find unchanged, with spaces written out.

        Where a run writes and on what machine it runs may change: a run that ran out of memory goes on
        with a smaller `engine.batch_tokens`.
        """
        data = self.config.model_dump(mode="json")
        data["search"]["stages"] = [
            {
                **stage.model_dump(mode="json"),
                "space": [space.model_dump(mode="json") for _, space, _ in self.spaces(i)],
            }
            for i, stage in enumerate(self.config.search.stages)
        ]
        for key in ("run_dir", "export"):
            data.pop(key)
        data["engine"] = {"dtype": data["engine"]["dtype"]}
        return data


def load_config(path: Path | str) -> LoadedConfig:
    """Read and validate a run file.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or value; the message names file
            and key and says what is allowed.
    """
    path = Path(path)
    return LoadedConfig(validate(RunConfig, load_yaml(path), str(path)), path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two configurations differ."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        name = f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def _absolute(text: str, folder: Path) -> str:
    """A path made absolute from `folder`; a hub id stays as it is."""
    expanded = expand(text)
    path = Path(expanded)
    if path.is_absolute():
        return str(path)
    if looks_like_path(text) or (folder / path).exists():
        return str((folder / path).resolve())
    return text
