"""What a trial costs outside the engine, and what a resume costs: every optimizer on both kinds of storage.

    python benchmarks/loop.py

A real study runs over the shipped space `blocks`, bound to three models of 30 layers, with an engine that
answers 100 items at once and is not counted. Times are medians of the 20 trials around trial 10, 1,000 and
5,000, in milliseconds:

    ask      the optimizer's next proposal
    decode   parameters to recipe
    record   the items' file and the trial in the storage, both synced to disk
    tell     the optimizer learns
    all      everything between two trials but the engine: the four above, scoring, digest, bookkeeping
    Optuna   the part of `all` that is spent inside Optuna: its storage, and its samplers' ask
    worst    the largest `all` of the 20: `cma` and `mixed` do their work once a generation

An optimizer in `FILLED` is too slow to be asked 5,000 times: there, uniformly drawn trials are recorded up to
ten before each mark, the study is resumed from them and asked 20 times. A resume is measured from opening the
storage to the first new proposal, in a study of 5,010 trials.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import psutil
import yaml

from evomerge.engine.base import Completion, GenerateRequest, Likelihood, LikelihoodRequest, Loaded
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.score import Score
from evomerge.evaluate.task import Suite
from evomerge.merge.methods import SPECS
from evomerge.recipe import Recipe
from evomerge.report.outcome import markdown_table
from evomerge.resources import find_resource
from evomerge.search import FloatParameter
from evomerge.search.base import Optimizer
from evomerge.sources.layout import Layout
from evomerge.space import BoundSpace, Family, SearchSpace
from evomerge.study.budget import Budget
from evomerge.study.fixed import fixed_recipes
from evomerge.study.plan import Plan, Stage
from evomerge.study.scoring import Scorebook
from evomerge.study.storage import TrialLog
from evomerge.study.study import Observer, Study
from evomerge.study.trial import FIXED, Outcome, Trial
from evomerge.yamlfile import load_yaml, validate

HERE = Path(__file__).resolve().parent
LAYERS, MODELS, ITEMS = 30, ("math", "code", "chat"), 100
OPTIMIZERS = ("cma", "mixed", "tpe", "random")
STORAGES = ("journal", "sqlite")
FILLED = ("tpe", "gp", "nsga2", "nsga3", "qmc")
EMPTY_TOKEN = json.dumps({"trial": {}, "study": {}})  # what Optuna's samplers note of a trial: nothing
PHASES = ("ask", "decode", "record", "tell")
TARGET_MS, TARGET_RESUME = 20.0, 5.0  # of `cma` on the default storage
PACKAGES = ("evomerge", "optuna", "cma", "cmaes", "numpy", "sqlalchemy")


class CoinEngine:
    """Answers an item rightly with a probability that falls with the distance of the weights from 0.5."""

    info: Mapping[str, Any] = {}

    def load(self, recipe: Recipe) -> Loaded:
        """Settle what the answers depend on."""
        self._digest = recipe.digest
        weights = [values["weight"] for s in recipe.cells.values() for values in s.models.values()]
        self._share = 1.0 - sum((w - 0.5) ** 2 for w in weights) / max(1, len(weights))
        return Loaded(0.0, 0, self._digest)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """`yes` or `no` with twenty words of reasoning."""
        answers = []
        for request in requests:
            coin = zlib.crc32((self._digest + request.prompt).encode()) / 2**32
            text = "because of this and that " * 4 + ("yes" if coin < self._share else "no")
            answers.append(Completion(text, 21, "stop"))
        return answers

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """None is asked for."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to give back."""


@dataclass
class Stopwatch(Observer):
    """Seconds by phase of every trial; a trial is what lies between two calls of `trial`.

    `opened` and `first_ask` are seconds since the watch was made.
    """

    begun: float = field(default_factory=time.perf_counter)
    opened: float = 0.0
    first_ask: float = 0.0
    trials: dict[int, dict[str, float]] = field(default_factory=dict)
    _open: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _since: float = 0.0

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to `phase`."""

        def timing(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                now = time.perf_counter()
                self._open[phase] += now - start
                if phase == "ask" and not self.first_ask:
                    self.first_ask = now - self.begun

        return timing

    def trial(self, study: Study, trial: Trial) -> None:
        """Close a trial; what `tell` then takes counts to the next one."""
        now = time.perf_counter()
        self._open["all"] = now - self._since - self._open["engine"]
        if trial.stage != FIXED and self._open["ask"]:
            self.trials[trial.number] = dict(self._open)
        self._open, self._since = defaultdict(float), now

    def medians(self, numbers: range) -> dict[str, float]:
        """Median milliseconds of each phase over the trials `numbers`, and the worst of them."""
        rows = [self.trials[n] for n in numbers if n in self.trials]
        middle = {
            phase: 1000 * median(row.get(phase, 0.0) for row in rows) for phase in (*PHASES, "all", "Optuna")
        }
        return middle | {"worst": 1000 * max(row["all"] for row in rows)}


class Bench:
    """One optimizer on one storage, in a folder of its own."""

    def __init__(self, optimizer: str, storage: str, folder: Path) -> None:
        self.optimizer, self.folder = optimizer, folder
        folder.mkdir()
        self.location = (
            str(folder / "study.journal") if storage == "journal" else f"sqlite:///{folder}/study.db"
        )
        self.family = family()
        self.suite = Suite.load(write_suite(folder))

    def run_to(self, trials: int) -> Stopwatch:
        """Open the study as a new process would, run it to `trials` trials, give its times."""
        engine, space = CoinEngine(), blocks(self.family)
        store = ItemStore(self.folder / "items")
        fixed = fixed_recipes(self.family, scales=(), subset_scales=())[:2]
        watch = Stopwatch()
        with self.log() as log, optuna_counted(watch, log):
            watch.opened = time.perf_counter() - watch.begun
            patch(watch, space, decode="decode")
            patch(watch, engine, load="engine", generate="engine")
            patch(watch, store, write="record")
            patch(watch, log, add="record")
            plan = Plan(fixed, (Stage("blocks", space, 0.1, 1.0),), self.optimizer, Budget(trials=trials))
            study = Study(plan, self.suite, Scorebook(engine, self.suite, store, print), log, watch)
            make = study._optimizer
            study._optimizer = lambda stage, restart: clocked(watch, make(stage, restart))  # type: ignore
            watch._since = time.perf_counter()
            study.run()
        return watch

    def fill_to(self, trials: int) -> None:
        """Record uniformly drawn trials, as cheaply as the storage can."""
        generator, space = random.Random(trials), blocks(self.family)
        with self.log() as log:
            while len(log) < trials:
                params = {
                    p.name: generator.uniform(p.low, p.high)
                    for p in space.parameters
                    if isinstance(p, FloatParameter)
                }
                fitness = generator.random()
                trial = Trial(
                    number=len(log),
                    stage="blocks",
                    outcome=Outcome.COMPLETE,
                    digest=f"{len(log):064x}",
                    params=params,
                    token=EMPTY_TOKEN,
                    fitness=fitness,
                    scores={"coin": Score(fitness, 0.05, ITEMS)},
                    items=ITEMS,
                )
                log.add(trial, space.parameters)

    def resume(self, trials: int) -> dict[str, float]:
        """Seconds to go on with a study of `trials` trials, and the parts of that."""
        watch = self.run_to(trials + 1)
        return {
            "open the storage": watch.opened,
            "rebuild the optimizer": watch.first_ask - watch.opened,
            "all": watch.first_ask,
        }

    @contextmanager
    def log(self) -> Iterator[TrialLog]:
        """The study's record, closed at the end."""
        log = TrialLog(self.location, "loop")
        try:
            yield log
        finally:
            log.close()


def patch(watch: Stopwatch, thing: Any, **phases: str) -> None:
    """Time methods of one object."""
    for name, phase in phases.items():
        setattr(thing, name, watch.timed(phase, getattr(thing, name)))


def clocked(watch: Stopwatch, optimizer: Optimizer) -> Optimizer:
    """The optimizer, timed."""
    patch(watch, optimizer, ask="ask", tell="tell")
    return optimizer


@contextmanager
def optuna_counted(watch: Stopwatch, log: TrialLog) -> Iterator[None]:
    """Count what is spent inside Optuna: the storage's writes, and the samplers' asks."""
    patch(watch, log._storage, create_new_trial="Optuna")
    ask = optuna.Study.ask
    optuna.Study.ask = watch.timed("Optuna", ask)  # type: ignore[method-assign]
    try:
        # A plain function becomes a method again when it is looked up through an instance.
        yield
    finally:
        optuna.Study.ask = ask  # type: ignore[method-assign]


def family() -> Family:
    """Three experts that change attention and mlp of a model of 30 layers."""
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts]
    layout = Layout(["model.embed_tokens.weight", *names, "model.norm.weight"])
    changed = {cell for cell in layout.by_cell if cell.module in ("attention", "mlp")}
    return Family(layout, dict.fromkeys(MODELS, changed), SPECS)


def blocks(models: Family) -> BoundSpace:
    """The shipped space of that name."""
    path = find_resource("search_spaces", "blocks", HERE, "benchmarks/loop.py")
    return validate(SearchSpace, load_yaml(path), str(path)).bind(models, str(path))


def write_suite(folder: Path) -> Path:
    """One task of `ITEMS` calibration items."""
    sizes = {"calibration": ITEMS, "selection": 2, "held_out": 2}
    rows = [
        {"id": f"{split}-{i}", "split": split, "question": f"{split} {i}?", "answer": "yes"}
        for split, size in sizes.items()
        for i in range(size)
    ]
    (folder / "coin.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"data": "coin.jsonl", "prompt": "{{ question }}", "scorer": "contains", "max_tokens": 32}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"coin": task}}), encoding="utf-8")
    return path


def measure(
    optimizer: str, storage: str, marks: Sequence[int], window: int, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table of trials, and the row of the table of resumes."""
    bench = Bench(optimizer, storage, folder)
    rows = []
    for mark in marks:
        around = range(max(0, mark - window // 2), mark + window // 2)
        if optimizer in FILLED:
            bench.run_to(2)  # the fixed recipes
            bench.fill_to(around.start)
        watch = bench.run_to(around.stop)
        rows.append({"optimizer": optimizer, "storage": storage, "trial": mark, **watch.medians(around)})
        print(f"{optimizer} {storage} {mark}: {rows[-1]['all']:.1f} ms", file=sys.stderr, flush=True)
    resumed = bench.resume(around.stop)
    return rows, {"optimizer": optimizer, "storage": storage, "trials": around.stop, **resumed}


def page(
    rows: Sequence[Mapping[str, Any]], resumes: Sequence[Mapping[str, Any]], window: int, took: float
) -> str:
    """The report in Markdown."""
    marks = ", ".join(dict.fromkeys(f"{row['trial']:,}" for row in rows))
    return (
        "\n\n".join(
            [
                "# What a trial costs outside the engine",
                f"Made by `python benchmarks/loop.py` in {took / 60:.0f} min. Milliseconds, medians of the "
                f"{window} trials around {marks}; {ITEMS} items a trial; {dimension()} parameters. `Optuna` "
                "is the part of `all` inside Optuna's storage and samplers. The module's docstring says what "
                "is measured.",
                markdown_table(*as_table(rows, 2)),
                "## Resume",
                "Seconds from opening the storage to the first new proposal. Opening reads all trials, "
                "nearly all of it inside Optuna; the rest rebuilds study and optimizer.",
                markdown_table(*as_table(resumes, 2)),
                "## Against the targets",
                "\n".join(f"- {line}" for line in verdicts(rows, resumes)),
                "## Machine",
                "\n".join(f"- {key}: {value}" for key, value in machine().items()),
            ]
        )
        + "\n"
    )


def dimension() -> int:
    """Number of parameters of the space."""
    return blocks(family()).dimension


def as_table(rows: Sequence[Mapping[str, Any]], decimals: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    cells = [
        [
            f"{v:.{decimals}f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
            for v in row.values()
        ]
        for row in rows
    ]
    return list(rows[0]), cells


def verdicts(rows: Sequence[Mapping[str, Any]], resumes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For every optimizer and storage at the last mark: within the targets, or what costs."""
    last = max(row["trial"] for row in rows)
    for row in (row for row in rows if row["trial"] == last):
        resume = next(
            r for r in resumes if (r["optimizer"], r["storage"]) == (row["optimizer"], row["storage"])
        )
        line = (
            f"`{row['optimizer']}`, {row['storage']}: {row['all']:.1f} ms at {last:,} "
            f"({'within' if row['all'] <= TARGET_MS else 'above'} {TARGET_MS:.0f} ms; "
            f"{row['Optuna'] / row['all']:.0%} of it in Optuna), resume {resume['all']:.1f} s "
            f"({'within' if resume['all'] <= TARGET_RESUME else 'above'} {TARGET_RESUME:.0f} s; "
            f"{resume['open the storage'] / resume['all']:.0%} of it opening Optuna's storage)"
        )
        yield line


def machine() -> dict[str, str]:
    """What the times depend on."""
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line]
        if cpu.exists()
        else []
    )
    return {
        "processor": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load when the report was written": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="few trials, to see that it works; writes no file"
    )
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--storages", nargs="+", default=STORAGES, choices=STORAGES)
    parser.add_argument("--folder", type=Path, help="where studies are kept while measuring; its disk counts")
    parser.add_argument("--out", type=Path, help="the report (default: loop.md beside this file)")
    options = parser.parse_args(arguments)
    marks, window = ((4, 8, 12), 4) if options.quick else ((10, 1_000, 5_000), 20)
    start, rows, resumes = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for storage in options.storages:
            for optimizer in options.optimizers:
                place = Path(folder) / f"{optimizer}-{storage}"
                found, resumed = measure(optimizer, storage, marks, window, place)
                rows += found
                resumes.append(resumed)
    report = page(rows, resumes, window, time.monotonic() - start)
    print(report)
    out = options.out or (None if options.quick else HERE / "loop.md")
    if out is not None:
        out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
