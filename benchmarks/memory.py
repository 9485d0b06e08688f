"""How much memory does a merge take? Writes benchmarks/memory.md.

    python benchmarks/memory.py [--gigabytes 8] [--models 4] [--limit 3] [--folder FOLDER]

Makes a base and models of random bfloat16 weights (Llama shapes, sharded), then merges them with
`evomerge merge` in a process whose address space is limited, once per method, and reports its peak resident
memory beside the bound that the project promises: 1 GB plus 6 times the largest tensor in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Set
from pathlib import Path

import torch
import yaml
from shapes import Shape, Shapes, entries

from evomerge.merge.shards import SAFETENSORS_DTYPES, Entry
from evomerge.merge.writer import write_model
from evomerge.report.outcome import markdown_table

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(hidden=4096, intermediate=14336, layers=0, vocabulary=32_000, keys=1024)  # but for its layers
PER_MODEL = {
    "linear": {"weight": 0.25},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}


def main() -> None:
    """Make the models, merge them by every method, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of a model")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--limit", type=float, default=3.0, help="address space of the merge, in GB")
    parser.add_argument("--folder", type=Path, default=None, help="where models are made; removed at the end")
    parser.add_argument("--methods", nargs="+", default=list(PER_MODEL), choices=list(PER_MODEL))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-", dir=arguments.folder))
    try:
        shapes = llama(arguments.gigabytes)
        names = [f"model{i}" for i in range(arguments.models)]
        for seed, name in enumerate(["base", *names]):
            make_model(folder / name, shapes, seed)
        rows = []
        for method in arguments.methods:  # written after each one: the later ones take minutes
            rows.append(merge(folder, names, method, arguments.limit))
            print(*rows[-1], flush=True)
            text = report(rows, shapes, arguments)
            (ROOT / "benchmarks" / "memory.md").write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(text)


def llama(gigabytes: float) -> Shapes:
    """Tensors of a model of about that size in bfloat16."""
    outside, layer = entries(SHAPE.outside()) * 2, entries(SHAPE.layer(0)) * 2
    return SHAPE.tensors(max(1, round((gigabytes * 1e9 - outside) / layer)))


def make_model(folder: Path, shapes: Shapes, seed: int) -> None:
    """Random weights: the base's from seed 0, the others' differ from it by small noise."""
    config = folder.with_name(f"{folder.name}-config")
    config.mkdir()
    layers = sum(name.endswith("q_proj.weight") for name in shapes)
    data = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": SHAPE.hidden}
    data |= {"intermediate_size": SHAPE.intermediate, "vocab_size": SHAPE.vocabulary, "dtype": "bfloat16"}
    data |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": layers}
    data["tie_word_embeddings"] = False
    (config / "config.json").write_text(json.dumps(data), encoding="utf-8")

    base, noise = (torch.randn((1 << 24) + 9, generator=torch.Generator().manual_seed(n)) for n in (0, seed))

    def tensors(names: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            tensor = tiled(base, shape).mul_(0.02)
            if seed:
                tensor.add_(tiled(noise, shape), alpha=5e-4)
            yield name, tensor.bfloat16()

    dtype = SAFETENSORS_DTYPES["bfloat16"]
    wanted = [Entry(name, shape, dtype, math.prod(shape) * 2) for name, shape in shapes.items()]
    write_model(folder, wanted, tensors, config, key=folder.name, max_shard_bytes=2_000_000_000)
    shutil.rmtree(config)


def tiled(numbers: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of that shape filled with `numbers` over and over; drawing them all would take minutes."""
    count = math.prod(shape)
    return numbers.repeat(-(-count // numbers.numel()))[:count].clone().reshape(shape)


def merge(folder: Path, names: list[str], method: str, limit: float) -> list[str]:
    """One row: merge in a process of its own, and read its peak resident memory."""
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": PER_MODEL[method]} for name in names],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method == "linear":
        recipe["models"].append({"model": str(folder / "base"), "parameters": {"weight": 0.0}})
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = [sys.executable, "-m", "evomerge", "merge", str(path), str(folder / "out")]
    bytes_limit = int(limit * 1e9)
    start = time.perf_counter()
    process = subprocess.Popen(
        words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (bytes_limit, bytes_limit))
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{method}: the merge failed")
    shutil.rmtree(folder / "out")
    return [method, f"{usage.ru_maxrss * 1024 / 1e9:.2f}", f"{seconds:.0f}"]


def report(rows: list[list[str]], shapes: Shapes, arguments: argparse.Namespace) -> str:
    """The whole page."""
    size = entries(shapes) * 2
    largest = max(math.prod(shape) for shape in shapes.values()) * 4
    bound = 1 + 6 * largest / 1e9
    paragraphs = [
        "# Memory of a merge",
        f"Made by `python benchmarks/memory.py`: a base and {arguments.models} models of {size / 1e9:.1f} GB "
        "of random bfloat16 weights each (shards of 2 GB at most), merged with `evomerge merge` in a process "
        f"whose address space is limited to {arguments.limit:g} GB. The largest tensor has "
        f"{largest / 1e9:.2f} GB in float32, so the bound is 1 GB + 6 x {largest / 1e9:.2f} GB = "
        f"{bound:.2f} GB. Seconds are of the whole process, reading and writing the disk included.",
        markdown_table(["method", "peak resident GB", "seconds"], rows),
        f"Machine: {os.cpu_count()} cores, {platform.machine()}; torch {torch.__version__}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
