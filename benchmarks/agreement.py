"""Do the vLLM and the transformers engine answer alike? Writes benchmarks/agreement.md.

    python benchmarks/agreement.py [--items 16] [--dtypes float32 bfloat16]

The same candidates of the demo's family in both engines: the share of greedy answers that are equal, the
share of scores that are, and how far log-likelihoods of the reference answers lie apart. In bfloat16 two
ways of computing the same sums round differently, and where two tokens are nearly as likely an answer goes
another way.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from evomerge.build import Parts, versions
from evomerge.config import load_config
from evomerge.engine import vllm_compat
from evomerge.engine.base import Engine, Likelihood, LikelihoodRequest
from evomerge.engine.factory import open_engine
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.evaluate.score import ItemScore
from evomerge.recipe import Setting
from evomerge.report.outcome import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"task_arithmetic": {"weight": 0.5}, "ties": {"weight": 0.6, "density": 0.5}}
Answers = tuple[list[ItemScore], list[Likelihood]]


def main() -> None:
    """Ask both engines in every dtype, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=16, help="calibration items per task, 16 at most")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    parts = Parts.open(load_config(ROOT / "runs" / "demo.yaml"))
    rows = []
    for dtype in arguments.dtypes:
        found = []
        for kind, options in (("vllm", {"max_model_len": 512}), ("transformers", None)):
            engine = open_engine(
                parts.sources,
                parts.layout,
                kind=kind,  # type: ignore[arg-type]
                dtype=dtype,
                options=options,
            )
            found.append([answers(engine, parts, method, arguments.items) for method in RECIPES])
            engine.close()
        rows += [[method, dtype, *compared(*both)] for method, *both in zip(RECIPES, *found, strict=True)]
    header = ["method", "dtype", "equal answers", "equal scores", "largest difference in nats", "mean"]
    paragraphs = [
        "# vLLM and transformers",
        f"Made by `python benchmarks/agreement.py`: {4 * arguments.items} calibration items of the demo's "
        "four tasks, one candidate a row, answered by both engines. Equal answers: greedy, in text and "
        "number of tokens. Equal scores: the items that the scorer gives the same. Nats: of the "
        "log-likelihoods of the reference answers.",
        markdown_table(header, rows),
        f"Machine: {os.cpu_count()} cores, {platform.machine()}; vLLM {vllm_compat.version()}, "
        f"{', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]
    text = "\n\n".join(paragraphs) + "\n"
    (ROOT / "benchmarks" / "agreement.md").write_text(text, encoding="utf-8")
    print(text)


def answers(engine: Engine, parts: Parts, method: str, count: int) -> Answers:
    """Scored answers of one candidate, and the log-likelihoods of the reference answers."""
    setting = Setting(method, {}, dict.fromkeys(parts.sources.models, RECIPES[method]))
    recipe = parts.family.recipe(dict.fromkeys(parts.layout.by_cell, setting))
    items = subset(parts.suite, "calibration", count)
    engine.load(recipe)
    asked = [LikelihoodRequest(item.prompt, f" {item.answer}", chat=True) for item in items]
    return evaluate(engine, parts.suite, items), engine.loglikelihood(asked)


def compared(ours: Answers, theirs: Answers) -> list[str]:
    """Cells of one row."""
    apart = [abs(a.total - b.total) for a, b in zip(ours[1], theirs[1], strict=True)]
    pairs = list(zip(ours[0], theirs[0], strict=True))
    return [
        share([(a.completion, a.tokens) == (b.completion, b.tokens) for a, b in pairs]),
        share([a.value == b.value for a, b in pairs]),
        f"{max(apart):.1e}",
        f"{sum(apart) / len(apart):.1e}",
    ]


def share(equal: Sequence[bool]) -> str:
    """How many, and of how many."""
    return f"{sum(equal)} of {len(equal)} ({sum(equal) / len(equal):.1%})"


if __name__ == "__main__":
    main()
