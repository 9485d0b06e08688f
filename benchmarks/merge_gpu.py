"""How near is a candidate's merge on a GPU to a plain copy of its bytes? Writes benchmarks/merge_gpu.md.

    python benchmarks/merge_gpu.py [--shape llama2-7b] [--sources 3 8] [--methods ties ...] [--layers N]
    python benchmarks/merge_gpu.py --device cpu --tiny      (prints; shows that the script runs)

The model is one of random bfloat16 tensors, made on the device: nothing is downloaded. Of each count of
sources as many layers are merged as fit the card, and the table says how many. A candidate has other weights
and densities than the one before, as in a search. GB/s: base and sources read once and the result written
once, whatever is read in fact. Of copy: time of a device-to-device copy that moves as many bytes, measured in
the same run, divided by that of the candidate. Error: of some tensors, against the same recipe in float64,
in units of the last place of a bfloat16 of the tensor's usual size or of the entry's, whichever is larger;
rounding alone makes 0.5. Where the terms cancel, float32 and float64 may elect different signs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shapes import Shape

from evomerge.build import versions
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._method import TensorInputs
from evomerge.merge.plan import MergePlan, TensorOp
from evomerge.recipe import Recipe, Setting
from evomerge.report.outcome import markdown_table
from evomerge.sources.layout import Layout

NAMES = ("linear", "task_arithmetic", "dare_linear", "dare_ties", "ties", "breadcrumbs")
SHARE = 0.85  # of the free memory that may be taken
RESERVE = 12 << 30  # bytes for results under way and temporary tensors
CHECKED = (
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.down_proj.weight",
    "layers.0.input_layernorm.weight",
)


SHAPES = {
    "llama2-7b": Shape(4096, 11008, 32, 32000, 4096),
    "qwen2.5-7b": Shape(3584, 18944, 28, 152064, 512, biases=True),
    "tiny": Shape(64, 96, 2, 100, 32, biases=True),
}


@dataclass
class RandomSources:
    """Full checkpoints on the device: a base, and models that differ from it by a little noise."""

    shapes: dict[str, tuple[int, ...]]
    count: int
    device: torch.device
    base_name: str = "base"
    statistics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the tensors."""
        generator = torch.Generator(self.device).manual_seed(0)

        def noise(name: str, scale: float) -> torch.Tensor:
            like = {"device": self.device, "dtype": torch.bfloat16, "generator": generator}
            return torch.randn(self.shapes[name], **like).mul_(scale)

        self.base = {name: noise(name, 0.02) for name in self.shapes}
        self.own = {
            (model, name): self.base[name] + noise(name, 5e-4)
            for model in self.models
            for name in self.shapes
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(f"m{number}" for number in range(self.count))

    def base_tensor(self, name: str) -> torch.Tensor:
        """See `TensorSources`."""
        return self.base[name]

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor:
        """See `TensorSources`."""
        return self.own[model, name].reshape(-1)

    def delta(self, model: str, name: str) -> torch.Tensor:
        """See `TensorSources`."""
        return self.own[model, name].float() - self.base[name].float()

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor:
        """See `TensorSources`."""
        return self.delta(model, name).reshape(-1)


def main() -> None:
    """Measure every method and count of sources, fused and by torch; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="llama2-7b", choices=SHAPES)
    parser.add_argument("--tiny", action="store_true", help="a model of 100,000 parameters; only prints")
    parser.add_argument("--layers", type=int, default=None, help="default: as many as fit the card")
    parser.add_argument("--sources", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--candidates", type=int, default=5, help="after the first")
    parser.add_argument("--paths", nargs="+", default=["fused", "torch"], choices=["fused", "torch"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; `--device cpu --tiny` shows that the script runs")
    shape = SHAPES["tiny" if arguments.tiny else arguments.shape]
    rows = []
    for path in arguments.paths:
        for count in arguments.sources:
            layers = arguments.layers or fitting(shape, count, device, path)
            sources = RandomSources(shape.tensors(layers), count, device)
            for method in arguments.methods:
                rows.append(row(sources, method, path, layers, arguments.candidates))
                print(*rows[-1], flush=True)
            del sources
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    text = report(rows, arguments, device)
    if not arguments.tiny:
        (Path(__file__).parent / "merge_gpu.md").write_text(text, encoding="utf-8")
    print(text)


def fitting(shape: Shape, count: int, device: torch.device, path: str) -> int:
    """Layers of which base, sources and what the merger keeps fit the free memory."""
    if device.type != "cuda":
        return shape.layers
    # torch keeps float32 task vectors beside the sources; the kernels use the sources themselves
    per_entry = 2 + count * (2 if path == "fused" else 6)
    room = SHARE * torch.cuda.mem_get_info(device)[0] - RESERVE
    layers = [n for n in range(1, shape.layers + 1) if shape.entries(n) * per_entry <= room]
    if not layers:
        raise SystemExit(f"{count} sources do not fit this card with a single layer; ask for fewer")
    return layers[-1]


def setting_of(method: str, models: tuple[str, ...], candidate: int) -> Setting:
    """A setting whose weights and densities change from candidate to candidate."""
    step = 0.01 * candidate

    def values(number: int) -> dict[str, float]:
        # no simple ratios between weights: the terms would often cancel exactly
        usual = {"weight": (0.3 + step) * 1.0371**number, "density": 0.4 + step, "gamma": 0.01 + step / 10}
        return {key: usual[key] for key in SPECS[method].per_model if key in usual}

    return Setting(method, {}, {model: values(number) for number, model in enumerate(models)})


def row(sources: RandomSources, method: str, path: str, layers: int, candidates: int) -> list[str]:
    """One row of the table."""
    layout = Layout(tuple(sources.shapes))
    merger = Merger(sources, device=sources.device, cache_bytes=1 << 60, fused=path == "fused")
    seconds = []
    error = 0.0
    for candidate in range(candidates + 1):
        setting = setting_of(method, sources.models, candidate)
        recipe = Recipe("base", sources.models, dict.fromkeys(layout.by_cell, setting))
        plan = MergePlan.compile(recipe, layout)
        synchronize(sources.device)
        start = time.perf_counter()
        for _ in merger.materialize(plan):
            pass
        synchronize(sources.device)
        seconds.append(time.perf_counter() - start)
    for name, merged in merger.materialize(plan, {f"model.{name}" for name in CHECKED}):
        op = next(op for op in plan.ops if op.tensor == name)
        error = max(error, error_of(op, merged, sources))
    took = statistics.median(seconds[1:])
    moved = sum(tensor.nbytes for tensor in sources.base.values()) * (sources.count + 2)
    copied = copy_seconds(moved, sources.device)
    used = "kernels" if merger.fused_on_device else "torch" if sources.device.type != "cpu" else "CPU"
    numbers = [f"{took:.4f}", f"{moved / took / 1e9:.1f}", f"{copied / took:.2f}", f"{error:.2f}"]
    return [method, used, str(sources.count), str(layers), *numbers, f"{seconds[0]:.2f}"]


def error_of(op: TensorOp, merged: torch.Tensor, sources: RandomSources) -> float:
    """Largest difference from the same merge in float64, in the units of the module's docstring."""
    base = sources.base[op.tensor].double().reshape(-1)
    inputs = TensorInputs(
        base=base,
        deltas=[sources.own[model, op.tensor].double().reshape(-1) - base for model in op.setting.models],
        setting=op.setting,
        dtype=torch.float64,
        shape=tuple(merged.shape),
        seeds=op.seeds,
    )
    exact = METHODS[op.setting.method].merge(inputs)
    # bfloat16 has 8 significant bits: frexp's exponent less 8
    size = exact.abs().clamp_(min=float(base.abs().mean()))
    unit = torch.ldexp(torch.ones_like(exact), size.frexp().exponent - 8)
    return float(((merged.double() - exact).abs() / unit).max())


def copy_seconds(moved: int, device: torch.device) -> float:
    """Median seconds of copies within the device that read and write `moved` bytes in all."""
    size = min(moved // 2, 1 << 30)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return statistics.median(times[2:]) * moved / (2 * size)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(rows: list[list[str]], arguments: argparse.Namespace, device: torch.device) -> str:
    """The whole page."""
    header = ["method", "path", "sources", "layers", "s / candidate", "GB/s", "of copy", "error", "first s"]
    card = "the CPU"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        card = f"one {found.name} with {found.total_memory / 2**30:.0f} GiB"
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    shape = "tiny" if arguments.tiny else arguments.shape
    paragraphs = [
        "# Merging on a GPU",
        f"Ran on {card}; {libraries}. Made by `python benchmarks/merge_gpu.py --shape {shape}`: random "
        f"bfloat16 tensors, median of {arguments.candidates} candidates after the first. The script's first "
        "lines say what the columns are.",
        markdown_table(header, rows),
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
