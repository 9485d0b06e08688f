"""The numbers of an inspection against numpy in float64, and how tensors are read: each once."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.inspect import statistics
from evomerge.inspect.inspection import Inspection, inspect_models
from evomerge.inspect.sums import grouped, label_of
from evomerge.sources.checkpoint import TensorFiles
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet
from tests.tiny import tiny_adapter, tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
WAYS = ("all", "layer", "module", "cell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bf16, two full models (bf16, float32) and an adapter; `one` keeps q_proj of layer 0."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_model(folder / "base")
    one = tiny_model(folder / "one", seed=1, noise_from=base)
    edit(one, {Q_PROJ: tensors(base)[Q_PROJ]})
    two = tiny_model(folder / "two", seed=2, noise_from=base, noise=0.05)
    edit(two, {name: tensor.float() * 1.01 for name, tensor in tensors(two).items()})
    tiny_adapter(folder / "lora", base, seed=3)
    return folder


@pytest.fixture(scope="module")
def inspection(folder: Path) -> Inspection:
    return inspect_models(folder / "base", {name: folder / name for name in ("one", "two", "lora")})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: dict[str, torch.Tensor]) -> Path:
    kept = {name: tensor.clone() for name, tensor in tensors(folder).items()}
    save_file({**kept, **change}, folder / "model.safetensors")
    return folder


def flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().flatten().numpy()


def vectors(folder: Path, model: str, by: str) -> dict[str, list[np.ndarray]]:
    """Label -> task vectors of its tensors in float64, in the order of the base's tensors."""
    base = tensors(folder / "base")
    layout = Layout(base)
    groups: dict[str, list[np.ndarray]] = {}
    for name, start in base.items():
        if model == "base":
            vector = flat(start)
        elif model == "lora":
            vector = adapter_delta(folder / "lora", name, start)
        else:
            vector = flat(tensors(folder / model)[name]) - flat(start)
        groups.setdefault(label_of(layout.cell(name), by), []).append(vector)
    return groups


def adapter_delta(adapter: Path, name: str, start: torch.Tensor) -> np.ndarray:
    """alpha / r * B @ A in float64; alpha is 8 and r is 4."""
    factors = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in factors:
        return np.zeros(start.numel())
    a, b = (factors[f"{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    return (8 / 4 * (b @ a)).flatten()


def tied(vector: np.ndarray) -> int:
    _, counts = np.unique(np.abs(vector[vector != 0]), return_counts=True)
    return int(counts[counts > 1].sum())


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("model", ["one", "two", "lora"])
def test_the_numbers_of_a_model_are_those_of_numpy(inspection: Inspection, folder: Path, model: str, by: str):
    (row,) = (row for row in inspection.models if row.name == model)
    found = grouped(row.cells, by)
    expected, bases = vectors(folder, model, by), vectors(folder, "base", by)
    assert set(found) == set(expected)
    for label, parts in expected.items():
        whole, base = np.concatenate(parts), np.concatenate(bases[label])
        sums = found[label]
        assert sums.norm == pytest.approx(np.linalg.norm(whole), rel=1e-6 if model == "lora" else 1e-7)
        assert sums.base_norm == pytest.approx(np.linalg.norm(base), rel=1e-12)
        assert sums.relative_norm == pytest.approx(sums.norm / np.linalg.norm(base), rel=1e-12)
        assert sums.entries == whole.size
        assert sums.changed == np.count_nonzero(whole)
        assert sums.changed_share == np.count_nonzero(whole) / whole.size


@pytest.mark.parametrize("by", WAYS)
def test_equal_magnitudes_of_a_bf16_model_are_those_of_numpy(inspection: Inspection, folder: Path, by: str):
    found = grouped(inspection.models[0].cells, by)
    for label, parts in vectors(folder, "one", by).items():
        assert found[label].tied == sum(map(tied, parts))
    assert max(sums.tied_share or 0 for sums in found.values()) > 0.5, "bf16 makes many ties"


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("pair", list(combinations(["one", "two", "lora"], 2)), ids="/".join)
def test_the_numbers_of_a_pair_are_those_of_numpy(
    inspection: Inspection, folder: Path, pair: tuple[str, str], by: str
):
    found = grouped(inspection.pairs[pair], by)
    first, second = (vectors(folder, model, by) for model in pair)
    for label, sums in found.items():
        a, b = np.concatenate(first[label]), np.concatenate(second[label])
        assert sums.entries == a.size
        assert sums.ed == pytest.approx(np.linalg.norm(a - b), rel=1e-6)
        both = (a != 0) & (b != 0)
        assert sums.both == np.count_nonzero(both)
        if not both.any():
            assert sums.sign_conflict is None
            assert sums.cosine is None or sums.cosine == 0
            continue
        # float32 task vectors of the float32 model and the adapter: 2**-24 relative per entry
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert sums.cosine == pytest.approx(cosine, abs=1e-6)
        assert sums.cs == pytest.approx(abs(cosine), abs=1e-6)
        assert sums.pcc == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
        assert sums.sign_conflict == np.count_nonzero((a * b)[both] < 0) / np.count_nonzero(both)


def test_kinship_is_the_mean_over_pairs(inspection: Inspection):
    mean, rows = inspection.kinship, list(inspection.pair_totals.values())
    assert mean is not None
    assert mean.pairs == len(rows) == 3
    for key in ("pcc", "cs", "ed"):
        assert getattr(mean, key) == pytest.approx(np.mean([getattr(row, key) for row in rows]), rel=1e-12)


def test_kinship_needs_three_models(folder: Path):
    two = inspect_models(folder / "base", {"one": folder / "one", "lora": folder / "lora"})
    assert two.kinship is None


def test_equal_models_are_alike_and_at_distance_zero(folder: Path):
    (sums,) = inspect_models(folder / "base", {"a": folder / "two", "b": folder / "two"}).pair_totals.values()
    assert sums.ed == 0
    assert sums.sign_conflict == 0
    assert sums.cosine == pytest.approx(1, abs=1e-12)
    assert sums.pcc == pytest.approx(1, abs=1e-12)


def test_opposite_task_vectors_conflict_everywhere():
    delta = torch.tensor([1.0, -2.0, 0.0, 4.0])
    _, pairs = statistics.tensor_sums(torch.ones(4), {"a": delta, "b": -delta})
    sums = pairs["a", "b"]
    assert (sums.cosine, sums.cs, sums.sign_conflict, sums.both) == (-1, 1, 1, 3)


def test_a_model_equal_to_the_base_has_no_direction(folder: Path):
    inspection = inspect_models(folder / "base", {"copy": folder / "base", "one": folder / "one"})
    copy, (pair,) = inspection.models[0].total, inspection.pair_totals.values()
    assert (copy.norm, copy.changed, copy.tied_share) == (0, 0, None)
    assert (pair.cosine, pair.pcc, pair.sign_conflict) == (None, None, None)
    assert pair.ed == pytest.approx(inspection.models[1].total.norm, rel=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.3, 3.3])  # rounding falls on either side of zero
def test_a_constant_task_vector_has_a_cosine_but_no_pearson_correlation(value: float):
    deltas = {"a": torch.full((4097,), value), "b": torch.linspace(0.1, 1, 4097)}
    _, pairs = statistics.tensor_sums(torch.ones(4097), deltas)
    assert pairs["a", "b"].pcc is None
    assert pairs["a", "b"].cosine is not None


def test_the_distance_of_near_task_vectors_does_not_cancel():
    near = torch.linspace(0.1, 1, 1000)
    next_to = torch.nextafter(near, torch.tensor(2.0))
    _, pairs = statistics.tensor_sums(torch.ones(1000), {"a": near, "b": next_to})
    assert pairs["a", "b"].ed == pytest.approx(np.linalg.norm(flat(near) - flat(next_to)), rel=1e-12)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], 0),
        ([0, 0, 0], 0),
        ([0, 0, 3], 0),
        ([1, -1, 2], 2),
        ([1, 1, 1], 3),
        ([2, 0, -0.0, 1, -2, 1, 3], 4),
    ],
)
def test_equal_magnitudes_counts_every_entry_that_has_a_double(entries: list[float], expected: int):
    assert statistics.equal_magnitudes(torch.tensor(entries, dtype=torch.float32)) == expected


def test_block_borders_change_nothing(inspection: Inspection, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "BLOCK", 1000)  # divides no tensor
    models = {name: folder / name for name in ("one", "two", "lora")}
    blocks = inspect_models(folder / "base", models)
    for small, large in zip(blocks.models, inspection.models, strict=True):
        assert small.total.as_json() == pytest.approx(large.total.as_json(), rel=1e-12)
    for pair, sums in blocks.pair_totals.items():
        assert sums.as_json() == pytest.approx(inspection.pair_totals[pair].as_json(), rel=1e-9)


def test_every_stored_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    reads: Counter[tuple[Path, str]] = Counter()
    read = TensorFiles.read

    def counted(self: TensorFiles, name: str) -> torch.Tensor:
        reads[self.tensors[name].file, name] += 1
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "read", counted)
    inspect_models(folder / "base", {name: folder / name for name in ("one", "two", "lora")})
    stored = 3 * len(tensors(folder / "base")) + len(load_file(folder / "lora/adapter_model.safetensors"))
    assert set(reads.values()) == {1}
    assert len(reads) == stored


def test_only_one_tensor_of_each_model_is_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    held: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    read, delta = TensorFiles.read, SourceSet.delta

    def alive(name: str) -> None:
        assert {other for other, ref in held if ref() is not None} <= {name}

    def tracked_read(self: TensorFiles, name: str) -> torch.Tensor:
        alive(name)
        tensor = read(self, name)
        held.append((name, weakref.ref(tensor)))
        return tensor

    def tracked_delta(self: SourceSet, model: str, name: str, base: torch.Tensor | None = None):
        tensor = delta(self, model, name, base)
        if tensor is not None:
            held.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", tracked_read)
    monkeypatch.setattr(SourceSet, "delta", tracked_delta)
    inspect_models(folder / "base", {"one": folder / "one", "two": folder / "two"})
    assert len(held) > 4 * len(tensors(folder / "base"))  # base, two models, two task vectors but one


def test_progress_goes_from_none_to_all(folder: Path):
    told: list[tuple[int, int]] = []
    inspect_models(folder / "base", {"one": folder / "one"}, progress=lambda *step: told.append(step))
    count = len(tensors(folder / "base"))
    assert told == [(done, count) for done in range(count + 1)]


def test_a_tied_embedding_is_counted_once(folder: Path, tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    edit(base, {"lm_head.weight": tensors(base)[EMBEDDING].clone()})
    inspection = inspect_models(base, {"one": folder / "one"})
    stored = sum(tensor.numel() for tensor in tensors(folder / "base").values())
    assert inspection.models[0].total.entries == stored


def test_tensors_that_are_not_floating_point_take_no_part(tmp_path: Path):
    base = edit(tiny_model(tmp_path / "base"), {"model.steps": torch.tensor([1])})
    other = edit(tiny_model(tmp_path / "other"), {"model.steps": torch.tensor([2])})
    model = inspect_models(base, {"other": other}).models[0]
    assert (model.total.changed, model.skipped) == (0, {})


def test_modules_of_the_callers_own_are_measured(folder: Path):
    inspection = inspect_models(folder / "base", {"lora": folder / "lora"}, modules={"query": ["q_proj"]})
    groups = grouped(inspection.models[0].cells, "module")
    assert groups["query"].entries == 2 * 64 * 64
    assert groups["query"].changed > 0
