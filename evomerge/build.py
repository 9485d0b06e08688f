"""Puts the parts together: from a run file to a finished run. Used by the command line and from Python.

`run_search` and `resume_search` are the public functions; `Run` is an opened run directory.

Imports: everything; nothing but `cli` imports this.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evomerge.config import LoadedConfig, StageConfig, differences, load_config
from evomerge.engine.base import Engine
from evomerge.engine.factory import Kind, engine_kind, open_engine
from evomerge.errors import RunDirError
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.task import Suite
from evomerge.export.bundle import export_model, export_recipe, model_card
from evomerge.merge.methods import SPECS
from evomerge.merge.writer import Say, silent
from evomerge.model import open_recipe
from evomerge.recipe import Recipe
from evomerge.report.outcome import as_json, as_markdown
from evomerge.search import Start, make_optimizer
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet
from evomerge.space import Family
from evomerge.study.budget import Budget, end_of, seconds_of
from evomerge.study.final import Final, Result
from evomerge.study.fixed import fixed_recipes
from evomerge.study.scoring import Scorebook
from evomerge.study.storage import JOURNAL, TrialLog
from evomerge.study.study import Observer, Plan, Stage, Study
from evomerge.yamlfile import file_size

CONFIG = "config.json"  # what a run was started with, in its directory
ENGINE_LOG = "engine.log"  # what vLLM prints, in the run directory
LOCK = "lock"  # held while a process works in a run directory
PACKAGES = ("evomerge", "torch", "transformers", "optuna", "cma", "cmaes")


@dataclass(frozen=True)
class Parts:
    """What a run file names, opened and checked; nothing expensive has happened yet."""

    loaded: LoadedConfig
    sources: SourceSet
    layout: Layout
    family: Family
    suite: Suite
    stages: tuple[Stage, ...]
    engine: Kind

    @classmethod
    def open(cls, loaded: LoadedConfig) -> Parts:
        """Open sources, items and spaces.

        Raises:
            ConfigError, SourceError, FitnessError: what is wrong, and where.
        """
        config = loaded.config
        engine = engine_kind(config.engine.kind, config.engine.device, config.engine.options)
        limits = {split: n for split, n in config.items.model_dump().items() if n is not None}
        suite = Suite.load(loaded.fitness(), limits)
        sources = SourceSet.open(loaded.base(), loaded.models())
        layout = sources.layout(config.modules)
        family = family_of(sources, layout, config.seed)
        stages = tuple(_stages(loaded, family))
        for stage in stages:  # a wrong name or option must not wait until the stage begins
            make_optimizer(
                config.search.optimizer,
                stage.space.parameters,
                seed=config.seed,
                start=Start(stage.space.encode(family.recipe({}))),
                population_size=config.search.population_size,
                options=config.search.options,
            )
        return cls(loaded, sources, layout, family, suite, stages, engine)


def family_of(sources: SourceSet, layout: Layout, seed: int = 0) -> Family:
    """The family that `sources` form: which model may change which cell."""
    changes = {
        model: {layout.cell(name) for name in layout.tensors if sources.may_change(model, name)}
        for model in sources.models
    }
    kinds = {model: found.kinds for model, found in sources.statistics.items()}
    return Family(layout, changes, SPECS, base=sources.base_name, seed=seed, statistics=kinds)


def _stages(loaded: LoadedConfig, family: Family) -> list[Stage]:
    configs: list[StageConfig] = list(loaded.config.search.stages)
    total = sum(stage.share for stage in configs)
    stages, share = [], 0.0
    for index, stage in enumerate(configs):
        share += stage.share / total
        until = 1.0 if index == len(configs) - 1 else share
        for name, space, where in loaded.spaces(index):
            stages.append(Stage(name, space.bind(family, where), stage.sigma, until, slot=index))
    return stages


def make_engine(parts: Parts, kind: Kind | None = None) -> Engine:
    """The engine that the run file asks for, with the base model's weights; `kind` instead of its own."""
    run_dir = parts.loaded.run_dir
    settings = parts.loaded.config.engine.model_dump()
    return open_engine(
        parts.sources,
        parts.layout,
        **{**settings, "kind": kind or parts.engine},
        log=run_dir / ENGINE_LOG if run_dir.is_dir() else None,
    )


class Run:
    """An opened run directory; a context manager, because it is locked while it is open.

    Args:
        parts: what the run file names.
        resume: whether an earlier process has begun this run.
        say: told of warnings and progress, one line each.

    Attributes:
        engine: the kind of engine; with `auto` a resumed run keeps the one that it was begun with.

    Raises:
        RunDirError: the directory is in use, cannot be written, exists already (without `resume`), or
            belongs to another configuration (with it).
    """

    def __init__(self, parts: Parts, *, resume: bool = False, say: Say = silent) -> None:
        self.parts, self.say, self._resumed = parts, say, resume
        self.engine = parts.engine
        self.folder = parts.loaded.run_dir
        self._stack = ExitStack()
        begun = (self.folder / CONFIG).exists()
        if begun and not resume:
            raise RunDirError(
                f"{self.folder}: a run was begun here; go on with `evomerge resume {self.folder}`, "
                "or give the run file another name or `run_dir`"
            )
        if resume and not begun:
            raise RunDirError(f"{self.folder}: no run was begun here; start one with `evomerge search`")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(_locked(self.folder))
            self._check_or_write_config(begun)
        except OSError as error:
            self._stack.close()
            raise RunDirError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another `run_dir`"
            ) from error
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def search(self, engine: Engine, observer: Observer | None = None) -> Result:
        """Search, select, prove, export; goes on where an earlier process stopped."""
        config = self.parts.loaded.config
        location = config.storage or str(self.folder / JOURNAL)
        log = TrialLog(location, self.parts.loaded.name, exclusive=config.storage is None)
        self._stack.callback(log.close)
        if len(log) and not self._resumed:
            raise RunDirError(
                f"{location}: the study `{self.parts.loaded.name}` is there already, but this run is new; "
                "rename the run file or choose another `storage`"
            )
        book = Scorebook(engine, self.parts.suite, ItemStore(self.folder / "items"), self.say)
        plan = plan_of(self.parts, log)
        study = Study(plan, self.parts.suite, book, log, observer)
        log.note("engine", dict(engine.info))
        study.run()
        (observer or Observer()).begin(study, "final")
        final = Final(study, book, top=config.selection.top, progress=self.say)
        result = final.run()
        self._write_outcome(study, result, engine)
        self._export(result)
        return result

    def _check_or_write_config(self, begun: bool) -> None:
        now = {
            "name": self.parts.loaded.name,
            "storage": self.parts.loaded.config.storage,  # where `status` looks
            "config": self.parts.loaded.frozen(),
            "run_file": str(self.parts.loaded.path.resolve()),
            "sources": self.parts.sources.hashes(),
            "items": self.parts.suite.digest,
            "engine": self.parts.engine,
        }
        path = self.folder / CONFIG
        if not begun:
            document = {**now, "versions": versions(), "started": datetime.now().isoformat("T", "seconds")}
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
            temporary.replace(path)
            return
        then = begun_with(self.folder)
        if self.parts.loaded.config.engine.kind == "auto":
            self.engine = now["engine"] = then["engine"]
        keys = ("config", "sources", "items", "engine")
        lines = differences({key: then[key] for key in keys}, {key: now[key] for key in keys})
        if lines:
            shown = "\n  ".join(lines)
            raise RunDirError(
                f"{self.folder}: the run was begun with another configuration (then -> now):\n  {shown}\n"
                "Undo the change to go on, or start a new run under another name"
            )
        changed = differences(then["versions"], versions())
        if changed:
            self.say(f"versions have changed since the run began: {'; '.join(changed)}")

    def _write_outcome(self, study: Study, result: Result, engine: Engine) -> None:
        info = ", ".join(f"{key} {value}" for key, value in engine.info.items())
        spent = study.spent
        facts = {
            "trials": spent.trials,
            "calibration item evaluations": spent.items,
            "search time": f"{spent.seconds:.0f} s",
            "engine": info,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        (self.folder / "outcome.md").write_text(as_markdown(result, facts), encoding="utf-8")
        (self.folder / "outcome.json").write_text(
            json.dumps({**as_json(result), "facts": facts}, indent=1), encoding="utf-8"
        )

    def _export(self, result: Result) -> None:
        parts, winner = self.parts, result.winner
        best = self.folder / "best"
        for note in export_recipe(best, winner.recipe, parts.sources, parts.layout, result):
            self.say(note)
        if parts.loaded.config.export.model and not (best / "model").exists():
            size = parts.loaded.config.export.max_shard_size
            opened = (winner.recipe, parts.sources, parts.layout)
            _write_winner(self.folder, best / "model", opened, parts.loaded.name, size)


EXPORT_SECONDS = 10.0  # kept back for writing the outcome and the recipes


def plan_of(parts: Parts, log: TrialLog | None) -> Plan:
    """What the run's study is to do; `log` remembers a time of day that was fixed at the first start."""
    config = parts.loaded.config
    fixed = fixed_recipes(parts.family, scales=config.fixed.scales, subset_scales=config.fixed.subset_scales)
    sizes = parts.suite.sizes().values()
    final_items = (config.selection.top + 1) * sum(task["selection"] for task in sizes)
    final_items += (len(fixed) + 1) * sum(task["held_out"] for task in sizes)
    return Plan(
        fixed=fixed,
        stages=parts.stages,
        optimizer=config.search.optimizer,
        budget=_budget(parts, log),
        seed=config.seed,
        population_size=config.search.population_size,
        options=config.search.options,
        screen=config.fixed.screen_items,
        promote=config.fixed.promote,
        reserve=lambda seconds_per_item: final_items * seconds_per_item + EXPORT_SECONDS,
    )


def _budget(parts: Parts, log: TrialLog | None) -> Budget:
    """The limits; the moment that a time of day names is fixed when the run first starts."""
    budget, now = parts.loaded.config.budget, datetime.now()
    if budget.time is None:
        return Budget(budget.trials, None, budget.item_evaluations)
    seconds, end = seconds_of(budget.time, now), end_of(budget.time, now)
    if log is not None and end is not None:
        if "ends" not in log.notes():
            log.note("ends", end.isoformat())
        elapsed = log.trials[-1].elapsed if len(log) else 0.0
        seconds = elapsed + (datetime.fromisoformat(log.notes()["ends"]) - now).total_seconds()
    return Budget(budget.trials, seconds, budget.item_evaluations)


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunDirError(
            f"{folder}: another process is using this run directory; wait for it or stop it"
        ) from error
    return lock


def versions() -> dict[str, str]:
    """Versions of what a run's results depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def run_search(
    config: LoadedConfig | Path | str,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    say: Say = silent,
) -> Result:
    """Run a run file from start to end, or go on with a stopped run.

    Args:
        config: a run file.
        resume: go on; the configuration must be the one that the run was begun with.
        observer: told of every trial.
        say: told of progress and warnings, one line each.

    Raises:
        EvomergeError: what is wrong, and what to change.
    """
    loaded = config if isinstance(config, LoadedConfig) else load_config(config)
    parts = Parts.open(loaded)
    with Run(parts, resume=resume, say=say) as run:
        engine = make_engine(parts, run.engine)
        try:
            return run.search(engine, observer)
        finally:
            engine.close()


def resume_search(run_dir: Path | str, *, observer: Observer | None = None, say: Say = silent) -> Result:
    """Go on with the run in `run_dir`, with the run file that it was begun with."""
    return run_search(config_of(Path(run_dir)), resume=True, observer=observer, say=say)


def export_run(
    run_dir: Path, *, model: bool = False, folder: Path | None = None, max_shard_size: str | int = "5GB"
) -> list[Path]:
    """Write a finished run's winner as a model folder (default `best/model`); returns what there is.

    Raises:
        RunDirError: the run has no winner yet.
        EvomergeError: the sources have changed, or the folder cannot be written.
    """
    best = run_dir / "best"
    recipe = best / "recipe.yaml"
    if not recipe.exists():
        raise RunDirError(f"{run_dir}: the run has no winner yet; go on with `evomerge resume {run_dir}`")
    if model:
        target, size = folder or best / "model", file_size(max_shard_size, "max_shard_size")
        _write_winner(run_dir, target, open_recipe(recipe), target.name, size)
        return [*sorted(best.glob("*.yaml")), target]
    return sorted(best.glob("*.yaml"))


def _write_winner(
    run_dir: Path, target: Path, opened: tuple[Recipe, SourceSet, Layout], name: str, max_shard_bytes: int
) -> None:
    """The winner of a run as a model folder, its card with the run's outcome."""
    recipe, sources, layout = opened
    card = model_card(name, recipe, sources, (run_dir / "outcome.md").read_text(encoding="utf-8"))
    export_model(target, recipe, sources, layout, max_shard_bytes=max_shard_bytes, card=card)


def begun_with(run_dir: Path) -> dict[str, Any]:
    """What a run was begun with: name, storage, config, run_file, sources, items, engine, versions, started.

    Raises:
        RunDirError: no run was begun there.
    """
    try:
        document: dict[str, Any] = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunDirError(f"{run_dir}: no run was begun here ({CONFIG}: {error})") from error
    return document


def config_of(run_dir: Path) -> LoadedConfig:
    """The run file of a run directory.

    Raises:
        RunDirError: no run was begun there.
    """
    path = Path(begun_with(run_dir)["run_file"])
    loaded = load_config(path)
    if loaded.run_dir.resolve() != run_dir.resolve():
        raise RunDirError(
            f"{run_dir}: its run file {path} now writes to {loaded.run_dir}; set `run_dir` back to go on"
        )
    return loaded
