"""Does the vLLM engine stay what it was over a night? Writes benchmarks/soak.md.

    python benchmarks/soak.py [--candidates 200] [--items 4]

Candidates with other weights each time, by task arithmetic, TIES and DARE in turn, on the demo's family.
Memory of every process of the engine at candidate 10 and at the last; the base's completions at the start, in
the middle and at the end; processes left when the engine is closed.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import psutil

from evomerge.build import Parts, make_engine, versions
from evomerge.config import load_config
from evomerge.engine.base import GenerateRequest
from evomerge.engine.child import living
from evomerge.engine.vllm_engine import VllmEngine
from evomerge.evaluate.evaluator import subset
from evomerge.recipe import Recipe, Setting
from evomerge.report.outcome import markdown_table

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("task_arithmetic", "ties", "dare_ties")
WARM = 10  # candidates until memory is looked at


def main() -> None:
    """Run the candidates, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--items", type=int, default=4, help="calibration items per task")
    arguments = parser.parse_args()
    parts = Parts.open(load_config(ROOT / "runs" / "demo.yaml"))
    requests = [
        GenerateRequest(item.prompt, task.max_tokens, task.chat, task.system, task.stop)
        for item in subset(parts.suite, "calibration", arguments.items)
        for task in [parts.suite.tasks[item.task]]
    ]
    engine = make_engine(parts, "vllm")
    assert isinstance(engine, VllmEngine)
    base = parts.family.recipe({})
    answers, memory, start = [], {}, time.perf_counter()
    try:
        for number in range(1, arguments.candidates + 1):
            if number in (1, arguments.candidates // 2):
                answers.append(answers_of(engine, base, requests))
            engine.load(candidate(parts, number))
            engine.generate(requests)
            if number in (WARM, arguments.candidates):
                memory[number] = resident(engine)
                print(number, memory[number], f"{time.perf_counter() - start:.0f} s", flush=True)
        answers.append(answers_of(engine, base, requests))
        seconds = time.perf_counter() - start
    finally:
        tree = psutil.Process().children(recursive=True)
        engine.close()
    text = report(arguments, memory, answers, len(living(tree)), seconds, dict(engine.info))
    (ROOT / "benchmarks" / "soak.md").write_text(text, encoding="utf-8")
    print(text)


def candidate(parts: Parts, number: int) -> Recipe:
    """Another method and other weights than the one before."""
    method = METHODS[number % len(METHODS)]
    values = {"weight": round(0.2 + 0.6 * (0.618 * number % 1), 4)}
    if method != "task_arithmetic":
        values["density"] = round(0.2 + 0.7 * (0.414 * number % 1), 4)
    setting = Setting(method, {}, dict.fromkeys(parts.sources.models, values))
    return parts.family.recipe(dict.fromkeys(parts.layout.by_cell, setting))


def answers_of(engine: VllmEngine, recipe: Recipe, requests: list[GenerateRequest]) -> list[str]:
    """Completions of one recipe."""
    engine.load(recipe)
    return [completion.text for completion in engine.generate(requests)]


def resident(engine: VllmEngine) -> list[int]:
    """Bytes resident of this process, the engine's process and its workers."""
    host = psutil.Process(engine.pid)
    return [p.memory_info().rss for p in (psutil.Process(), host, *host.children(recursive=True))]


def report(
    arguments: argparse.Namespace,
    memory: dict[int, list[int]],
    answers: list[list[str]],
    left: int,
    seconds: float,
    info: dict[str, object],
) -> str:
    """The whole page."""
    names = ["search process", "engine process", *(f"worker {i}" for i in range(len(memory[WARM])))]
    rows = [
        [name, f"{early / 1e6:.0f}", f"{late / 1e6:.0f}", f"{late / early - 1:+.1%}"]
        for name, early, late in zip(names, memory[WARM], memory[arguments.candidates], strict=False)
    ]
    same = "identical" if answers[0] == answers[1] == answers[2] else "NOT identical"
    paragraphs = [
        "# A soak of the vLLM engine",
        f"Made by `python benchmarks/soak.py`: {arguments.candidates} candidates of "
        f"{', '.join(METHODS)} in turn, each with other weights, on the demo's family with "
        f"{4 * arguments.items} items, in {seconds:.0f} s.",
        markdown_table(["process", f"MB at {WARM}", f"MB at {arguments.candidates}", "growth"], rows),
        f"The base model's completions at the start, in the middle and at the end: {same}. Processes left "
        f"after the engine was closed: {left}.",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}; vLLM {info['vllm']}, {info['dtype']}; "
        f"{', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
