"""The command line. Each command is a few lines: parse, call `build`, print.

Imports: `build`, `config` and the rest inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from evomerge import __version__
from evomerge.errors import EvomergeError

if TYPE_CHECKING:
    from evomerge.inspect.inspection import Inspection
    from evomerge.inspect.sums import By
    from evomerge.study.final import Result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Search for the best way to merge fine-tuned language models, and prove that it is better.",
)
out = Console()
err = Console(stderr=True)

RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.yaml", help="The run file; `evomerge init` writes one.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUNDIR", help="A run's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]
Shard = Annotated[str, typer.Option(help="Largest size of one file of weights: 500MB, 5GB, 2GiB.")]


def main() -> None:
    """Run the command line; errors that a user can act on end with one message and exit code 2."""
    try:
        app()
    except EvomergeError as error:
        message = f"{type(error).__name__}: {error}"
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("Stopped. Finished trials are kept; go on with `evomerge resume RUNDIR`.", markup=False)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def search(
    run_file: RunFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search, choose on fresh data, prove and export."""
    from evomerge.config import load_config

    _search(load_config(run_file), resume, as_json)


@app.command()
def resume(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Go on with a stopped run."""
    from evomerge.build import config_of

    _search(config_of(run_dir), True, as_json)


def _search(loaded: Any, resume: bool, as_json: bool) -> None:
    from evomerge.build import run_search
    from evomerge.live import LiveObserver
    from evomerge.report.outcome import as_json as outcome_json

    with LiveObserver(err, loaded.run_dir) as observer:
        result = run_search(loaded, resume=resume, observer=observer, say=observer.say)
    if as_json:
        sys.stdout.write(json.dumps(outcome_json(result), indent=1) + "\n")
        return
    _print_outcome(result)
    best = loaded.run_dir / "best"
    out.print(f"\nWinner: {best}/recipe.yaml   Report: {loaded.run_dir}/outcome.md", soft_wrap=True)


def _print_outcome(result: Result) -> None:
    from evomerge.report.outcome import headline, short_table

    out.print(headline(result), style="bold", markup=False, highlight=False, soft_wrap=True)
    _print_table(*short_table(result))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table as wide as it is: a narrow terminal wraps whole lines, not cells."""
    grid = Table(*header, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*row)
    needed = out.measure(grid, options=out.options.update(max_width=10_000)).maximum
    Console(width=max(out.width, needed)).print(grid, highlight=False)


@app.command()
def status(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Where a run stands: trials, incumbent, time. Reads only; works while the run goes on."""
    from evomerge.status import read_status, status_rows

    facts = read_status(run_dir)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    if facts["headline"]:
        out.print(facts["headline"], style="bold", markup=False, highlight=False, soft_wrap=True)
    _print_table(*status_rows(facts))


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Our recipe, or a mergekit YAML.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write.")],
    max_shard_size: Shard = "5GB",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; default: that of the base.")
    ] = None,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Merge sources that changed since the recipe was scored.")
    ] = False,
    mergekit_rng: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            min=0,
            max=2**32 - 1,
            help="For a mergekit YAML with `dtype: float32`: draw the masks of dare and della as mergekit "
            "does with --random-seed SEED, on one CPU process. Bit-equal for up to 4 full models with the "
            "same torch and number of threads; not with adapters or a tokenizer key.",
        ),
    ] = None,
) -> None:
    """Merge a recipe into a model folder, one tensor at a time; goes on where a killed merge stopped."""
    from evomerge.model import merge_model

    written = merge_model(
        recipe,
        folder,
        max_shard_size=max_shard_size,
        dtype=dtype,
        allow_changed=allow_changed,
        mergekit_rng=mergekit_rng,
        say=lambda message: err.print(message, highlight=False, soft_wrap=True),
    )
    out.print(f"Wrote {written}", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL-OR-RECIPE", help="Model folder, hub id or recipe.")],
    fitness: Annotated[str, typer.Argument(metavar="FITNESS.yaml", help="Task suite: path or shipped name.")],
    split: Annotated[str, typer.Option(help="calibration, selection or held_out.")] = "selection",
    limit: Annotated[int | None, typer.Option(help="Most items per task.", min=1)] = None,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option(help="What runs the model; auto: vLLM if there."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a model or a recipe on a task suite."""
    from evomerge.errors import ConfigError
    from evomerge.evaluate.items import check_split
    from evomerge.model import evaluate_model
    from evomerge.resources import find_resource

    chosen = check_split(split, "--split", ConfigError)
    path = find_resource("fitness", fitness, Path.cwd(), "FITNESS.yaml")
    scores, fitness_value = evaluate_model(
        model, path, split=chosen, limit=limit, engine=engine, device=device, dtype=dtype
    )
    if as_json:
        data = {"fitness": fitness_value, "tasks": {task: score._asdict() for task, score in scores.items()}}
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
        return
    rows = [[task, f"{s.mean:.3f}", _plus_minus(s.stderr), str(s.n)] for task, s in scores.items()]
    items = str(sum(score.n for score in scores.values()))
    total = ["fitness", f"{fitness_value:.3f}", "", items]
    _print_table(["task", "score", "stderr", "items"], [*rows, total])


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f"±{stderr:.3f}"


@app.command()
def export(
    run_dir: RunDir,
    model: Annotated[bool, typer.Option("--model", help="Write the model folder too.")] = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to; default RUNDIR/best/model.")] = None,
    max_shard_size: Shard = "5GB",
) -> None:
    """Show a finished run's recipes and, with --model, write its winner as a model folder."""
    from evomerge.build import export_run

    for path in export_run(run_dir, model=model, folder=folder, max_shard_size=max_shard_size):
        out.print(path, highlight=False, soft_wrap=True)


@app.command()
def check(run_file: RunFile, as_json: AsJson = False) -> None:
    """Everything that can be known before the night: sources, space, disk, memory, seconds per candidate."""
    from evomerge.check import check_run
    from evomerge.config import load_config

    facts = check_run(load_config(run_file), say=lambda line: err.print(line, markup=False, highlight=False))
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    _print_table(["check", "found"], [[key, _shown(value)] for key, value in facts.items()])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "\n".join(_shown(inner) for inner in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command()
def inspect(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Models as NAME=PLACE or PLACE: a folder, a hub id (org/name@revision), or a LoRA adapter "
            "for the base. Or one run file, whose base and models are taken.",
        ),
    ],
    base: Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")] = None,
    by: Annotated[str | None, typer.Option(help="Long tables too: layer, module or cell (both).")] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATTERN", help="Tensors with PATTERN in their name form module NAME."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one HTML page.")] = None,
    as_json: AsJson = False,
) -> None:
    """How far models moved from their base, how alike they are, and where they conflict."""
    from evomerge.inspect.page import write_page
    from evomerge.inspect.tables import as_json as inspection_json
    from evomerge.inspect.tables import check_by

    way = check_by(by)
    inspection = _inspected(models, base, module or [])
    if html is not None:
        write_page(inspection, html)
        err.print(f"Wrote {html}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(inspection_json(inspection), indent=1, allow_nan=False) + "\n")
        return
    _print_inspection(inspection, way)


def _inspected(models: list[str], base: str | None, modules: list[str]) -> Inspection:
    from rich.progress import Progress

    from evomerge.errors import ConfigError
    from evomerge.inspect.inspection import inspect_models
    from evomerge.inspect.places import named_places, patterns, place

    extra = patterns(modules)
    run_files = [text for text in models if text.endswith((".yaml", ".yml"))]
    if run_files and (base is not None or len(models) > 1):
        raise ConfigError(f"`{run_files[0]}` names base and models; give it alone, or --base and models")
    if run_files:
        from evomerge.config import load_config

        loaded = load_config(Path(run_files[0]))
        start, refs = loaded.base(), loaded.models()
        extra = {**loaded.config.modules, **extra}
    elif base is None:
        raise ConfigError(
            "--base is missing; give the model that the others were trained from, or a run file"
        )
    else:
        start, refs = place(base, "base `base`"), named_places(models)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("tensors")
        return inspect_models(
            start, refs, modules=extra, progress=lambda n, all_: bar.update(task, completed=n, total=all_)
        )


def _print_inspection(inspection: Inspection, by: By | None) -> None:
    from evomerge.inspect import tables

    for line in tables.problem_lines(inspection):
        out.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    shown = [tables.model_table(inspection), tables.pair_table(inspection)]
    if by is not None:
        shown += [tables.long_model_table(inspection, by), tables.long_pair_table(inspection, by)]
    shown.append(tables.difference_table(inspection))
    for header, rows in shown:
        if rows:
            _print_table(header, rows)
            out.print()
    notes = [tables.difference_line(inspection), tables.kinship_line(inspection)]
    for note in (*notes, f"Equal magnitudes: {tables.NOTES['equal magnitudes']}"):
        if note is not None:
            out.print(note, markup=False, highlight=False, soft_wrap=True)


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub id; a LoRA adapter too.")],
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="TEXTS", help=".jsonl with `text`, or `prompt` and `completion`; else a text per line."
        ),
    ],
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The safetensors file to write.")],
    kind: Annotated[list[str] | None, typer.Option(help="fisher (default) or gram; may be repeated.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that an adapter was trained from.")] = None,
    estimator: Annotated[
        str,
        typer.Option(help="Fisher: tokens `sampled` from the model, or `empirical`, those of the texts."),
    ] = "sampled",
    tokens: Annotated[int, typer.Option(help="Texts are taken until there are this many tokens.")] = 32_768,
    max_length: Annotated[int, typer.Option(help="Most tokens of one text.")] = 512,
    batch: Annotated[int, typer.Option(help="Texts at once, for Gram matrices.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order of texts and of sampled tokens.")] = 0,
    exclude: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Leave tensors with such names out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
) -> None:
    """What the methods fisher and regmean need to know of a model: run it over texts and write a file."""
    from rich.progress import Progress

    from evomerge.inspect.places import place
    from evomerge.statistics.measure import Options, measure

    options = Options(
        kinds=tuple(dict.fromkeys(kind or ["fisher"])),
        estimator=estimator,  # type: ignore[arg-type]  # checked by `measure`, with a message
        max_length=max_length,
        max_tokens=tokens,
        batch=batch,
        seed=seed,
        exclude=exclude,
        device=device,
        dtype=dtype,
    )
    start = None if base is None else place(base, "--base")
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("tokens")
        done = measure(
            place(model, "MODEL"),
            texts,
            file,
            base=start,
            options=options,
            progress=lambda n, all_: bar.update(task, completed=n, total=all_),
        )
    counts = ", ".join(f"{name} of {count} tensors" for name, count in done.tensors.items())
    said = f"Wrote {file}: {counts}, from {done.tokens} tokens of {done.texts} texts"
    out.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One method, in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every merge method: models, parameters with range and default, what it needs, where it is from."""
    from evomerge import catalogue

    if name is not None:
        text = catalogue.page(name)
        if not as_json:
            out.print(text, markup=False, highlight=False, soft_wrap=True)
            return
    if as_json:
        rows = [row for row in catalogue.as_json() if name in (None, row["name"])]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    grid = Table(*catalogue.HEADER, box=None, pad_edge=False, padding=(0, 1, 1, 0))
    for row in catalogue.table():
        grid.add_row(*row)
    for column in grid.columns:
        column.overflow = "fold"
    Console(width=100, markup=False).print(grid, highlight=False)
    out.print("* for each model. `evomerge methods NAME` says what a method does.", highlight=False)


@app.command()
def init(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The file to write.")] = Path(
        "run.yaml"
    ),
) -> None:
    """Write an annotated run file to start from."""
    from evomerge.template import write_template

    write_template(run_file)
    out.print(f"Wrote {run_file}. Edit it, then: evomerge check {run_file}", highlight=False)
