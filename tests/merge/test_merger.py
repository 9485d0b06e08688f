"""The merger over tiny sources in memory, against a float64 reference written from the papers' formulas."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge import merger as merging
from evomerge.merge import workers
from evomerge.merge.compiled import available
from evomerge.merge.mask import keep_mask
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._method import TensorInputs
from evomerge.merge.plan import MergePlan, TensorOp
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet, own_or_delta
from evomerge.sources.streamed import TaskVector
from tests.tiny import tiny_adapter, tiny_model

SHAPES = {
    "model.embed_tokens.weight": (300, 130),  # more than one chunk
    "model.layers.0.self_attn.q_proj.weight": (16, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
}
CELLS = {Cell(None, "embedding"), Cell(0, "attention"), Cell(0, "mlp"), Cell(0, "norm")}
MODELS = ("math", "code", "chat")
UP = "model.layers.0.mlp.up_proj.weight"


class MemorySources:
    """Sources in memory; `chat` does not change the norm. Counts reads of task vectors."""

    base_name = "base"
    models = MODELS

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.base = {n: (torch.randn(s, generator=generator) * 0.1).to(dtype) for n, s in SHAPES.items()}
        self.base["model.position_ids"] = torch.arange(4)
        self.tuned = {
            (model, name): (self.base[name].float() + torch.randn(shape, generator=generator) * 0.02).to(
                dtype
            )
            for model in MODELS
            for name, shape in SHAPES.items()
            if (model, name) != ("chat", "model.layers.0.input_layernorm.weight")
        }
        self.reads: Counter[tuple[str, str]] = Counter()

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self.base)

    def base_tensor(self, name: str) -> torch.Tensor:
        return self.base[name]

    def delta(self, model: str, name: str) -> torch.Tensor | None:
        self.reads[model, name] += 1
        if (model, name) not in self.tuned:
            return None
        return self.tuned[model, name].float() - self.base[name].float()

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        self.reads[model, name] += 1
        tuned = self.tuned.get((model, name))
        return None if tuned is None else own_or_delta(tuned.reshape(-1), base)

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        raise AssertionError("only a merger without a cache streams, and only large tensors")


def plan_of(setting: Setting, sources: MemorySources, seed: int = 0, base: str = "base") -> MergePlan:
    recipe = Recipe(base, MODELS, dict.fromkeys(CELLS, setting), seed)
    return MergePlan.compile(recipe, Layout(sources.tensor_names))


def weighted(**weights: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": weight} for name, weight in weights.items()}


def same(weight: float, density: float) -> dict[str, dict[str, float]]:
    return {model: {"weight": weight, "density": density} for model in MODELS}


def reference(
    setting: Setting, base: np.ndarray, deltas: list[np.ndarray], masks: list[np.ndarray]
) -> np.ndarray:
    """One tensor in float64, straight from the definitions; `setting` complete, arrays flat."""
    shared, models = setting.parameters, list(setting.models.values())
    if setting.method == "slerp":
        a, b, t = base, base + deltas[0], shared["t"]
        if len(deltas) == 2:
            a, b = base + deltas[0], base + deltas[1]
        theta = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
        if np.cos(theta) > 0.9995:
            return (1 - t) * a + t * b
        return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)
    weight = np.array([values["weight"] for values in models])[:, None]
    if setting.method == "linear":
        total = (weight * (base + np.stack(deltas))).sum(0)
        return total / weight.sum() if shared["normalize"] else total
    rows = []
    for values, delta, mask in zip(models, deltas, masks, strict=True):
        kept = delta
        if setting.method == "ties":
            order = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(values["density"] * delta.size))]
            kept = np.zeros_like(delta)
            kept[order] = delta[order]
        elif setting.method.startswith("dare"):
            kept = delta * mask
        if shared.get("rescale") and np.abs(kept).sum() > 0:
            kept = kept * np.abs(delta).sum() / np.abs(kept).sum()
        rows.append(kept)
    x = weight * np.stack(rows)
    keep = np.ones_like(x)
    if setting.method.endswith("ties"):
        keep = np.sign(x) == np.where(x.sum(0) >= 0, 1, -1)
    mix = (x * keep).sum(0)
    if shared["normalize"]:
        divisor = (weight * keep).sum(0)
        mix = mix / np.where(divisor == 0, 1, divisor)
    return base + shared["lambda"] * mix


SETTINGS = {
    "linear": Setting("linear", {}, weighted(math=0.3, code=0.5, chat=0.4)),
    "linear with the base": Setting("linear", {}, weighted(base=0.5, math=0.5)),
    "linear not normalised": Setting("linear", {"normalize": False}, weighted(math=0.3, chat=0.4)),
    "slerp": Setting("slerp", {"t": 0.3}, {"math": {}}),
    "slerp of two": Setting("slerp", {"t": 0.6}, {"code": {}, "chat": {}}),
    "task arithmetic": Setting("task_arithmetic", {"lambda": 0.8}, weighted(math=0.5, code=-0.2, chat=0.7)),
    "task arithmetic mean": Setting("task_arithmetic", {"normalize": True}, weighted(math=1, code=2, chat=1)),
    "ties": Setting("ties", {}, same(1.0, 0.35)),
    "ties sum": Setting("ties", {"normalize": False, "lambda": 0.7, "rescale": True}, same(0.5, 0.2)),
    "dare_linear": Setting("dare_linear", {}, same(0.5, 0.4)),
    "dare_ties": Setting("dare_ties", {"normalize": True}, same(0.5, 0.6)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_tensors_equal_the_definition(name):
    """Float32 checkpoints: 1e-6 absolute is some 30 roundings of a value of 0.3."""
    sources = MemorySources(torch.float32)
    plan = plan_of(SETTINGS[name], sources, seed=3)
    merged = dict(Merger(sources, cache_bytes=1 << 30).materialize(plan))
    for op in plan.ops:
        if op.tensor not in SHAPES:
            continue
        base = sources.base[op.tensor].double().numpy().ravel()
        deltas, masks = [], []
        for index, (model, values) in enumerate(op.setting.models.items()):
            delta = sources.delta(model, op.tensor)
            deltas.append(np.zeros_like(base) if delta is None else delta.double().numpy().ravel())
            seed = op.seeds[index] if op.seeds else 0
            masks.append(keep_mask(seed, values.get("density", 1.0), base.size).numpy())
        expected = reference(op.setting, base, deltas, masks).reshape(SHAPES[op.tensor])
        np.testing.assert_allclose(merged[op.tensor].double().numpy(), expected, rtol=0, atol=1e-6)


def test_a_scaled_copy_scales_tensors_that_the_model_does_not_change():
    sources, norm = MemorySources(), "model.layers.0.input_layernorm.weight"
    setting = Setting("passthrough", {}, {"chat": {"scale": 0.5}})
    merged = dict(Merger(sources).materialize(plan_of(setting, sources)))
    assert torch.equal(merged[norm], 0.5 * sources.base[norm])


def test_the_base_may_be_one_of_the_models_of_a_karcher_mean():
    """Of two vectors it is the middle of the arc: the mean of the directions."""
    sources = MemorySources(torch.float32)
    setting = Setting("karcher", {}, {"base": {}, "math": {}})
    merged = dict(Merger(sources).materialize(plan_of(setting, sources)))[UP].double()
    a, b = sources.base[UP].double(), sources.tuned["math", UP].double()
    middle = a / a.norm() + b / b.norm()
    expected = middle / middle.norm() * (a.norm() + b.norm()) / 2
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_bfloat16_is_rounded_once_from_the_float32_merge(name):
    """Widening the checkpoint first and rounding the merge at the end gives the same bits."""
    narrow, wide = MemorySources(), MemorySources()
    wide.base = {n: t.float() if t.is_floating_point() else t for n, t in wide.base.items()}
    for sources in (narrow, wide):
        sources.merged = dict(Merger(sources).materialize(plan_of(SETTINGS[name], sources)))
    for tensor in SHAPES:
        assert narrow.merged[tensor].dtype == torch.bfloat16
        assert torch.equal(narrow.merged[tensor], wide.merged[tensor].bfloat16())


def test_names_come_in_the_order_of_the_checkpoint():
    sources = MemorySources()
    names = [name for name, _ in Merger(sources).materialize(plan_of(SETTINGS["ties"], sources))]
    assert names == list(sources.tensor_names)


def test_shapes_are_those_of_the_base():
    sources = MemorySources()
    merged = dict(Merger(sources).materialize(plan_of(SETTINGS["ties"], sources)))
    assert {name: tuple(merged[name].shape) for name in SHAPES} == SHAPES


def test_only_the_tensors_asked_for_are_merged():
    sources = MemorySources()
    assert [n for n, _ in Merger(sources).materialize(plan_of(SETTINGS["ties"], sources), {UP})] == [UP]
    assert {name for _, name in sources.reads} == {UP}


def test_a_tensor_does_not_depend_on_which_others_are_merged():
    """Random masks included: no state is carried from tensor to tensor."""
    sources = MemorySources()
    plan = plan_of(SETTINGS["dare_ties"], sources, seed=9)
    whole = dict(Merger(sources, cache_bytes=1 << 30).materialize(plan))
    torch.rand(17)
    for name in reversed(list(SHAPES)):
        ((_, alone),) = Merger(sources).materialize(plan, {name})
        assert torch.equal(alone, whole[name])


def test_another_seed_gives_another_dare():
    sources = MemorySources()
    one, other = (
        dict(Merger(sources).materialize(plan_of(SETTINGS["dare_linear"], sources, s), {UP})) for s in (0, 1)
    )
    assert not torch.equal(one[UP], other[UP])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cache_does_not_change_a_bit(name):
    sources = MemorySources()
    plan = plan_of(SETTINGS[name], sources)
    merger = Merger(sources, cache_bytes=1 << 30)
    dict(merger.materialize(plan_of(SETTINGS["ties sum"], sources)))
    cached, fresh = dict(merger.materialize(plan)), dict(Merger(sources).materialize(plan))
    assert all(torch.equal(cached[tensor], fresh[tensor]) for tensor in fresh)


def test_a_second_candidate_reads_no_task_vector_again():
    sources = MemorySources()
    merger = Merger(sources, cache_bytes=1 << 30)
    for name in ("ties", "dare_linear", "linear"):
        dict(merger.materialize(plan_of(SETTINGS[name], sources)))
    assert set(sources.reads.values()) == {1}


@pytest.mark.parametrize("name", ["slerp", "ties"])
def test_without_a_cache_a_tensor_is_given_before_the_next_is_read(name):
    sources = MemorySources()
    tensors = Merger(sources).materialize(plan_of(SETTINGS[name], sources))
    first, _ = next(tensors)
    assert {tensor for _, tensor in sources.reads} == {first}


def test_a_merger_that_forgets_holds_no_memory_and_merges_as_before():
    sources = MemorySources()
    merger = Merger(sources, cache_bytes=1 << 30)
    before = dict(merger.materialize(plan_of(SETTINGS["ties"], sources)))
    merger.forget()
    assert merger.cached_bytes == 0
    after = dict(merger.materialize(plan_of(SETTINGS["ties"], sources)))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["ties", "dare_linear", "linear", "task arithmetic"])
def test_tensors_begun_ahead_by_several_threads_come_in_order_with_the_same_bits(name, monkeypatch):
    sources = MemorySources()
    plan = plan_of(SETTINGS[name], sources)
    alone = list(Merger(sources).materialize(plan))
    monkeypatch.setattr(workers, "SHARED", 1)
    torch.set_num_threads(3)
    merger = Merger(sources, cache_bytes=1 << 30)
    for _ in range(3):
        together = list(merger.materialize(plan))
        assert [name for name, _ in together] == [name for name, _ in alone]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(together, alone, strict=True))


def test_a_pass_that_is_left_early_merges_nothing_that_was_not_begun(monkeypatch):
    sources, done, go_on = MemorySources(), [], threading.Event()
    torch.set_num_threads(2)
    merger = Merger(sources, cache_bytes=1 << 30)
    merged = merging._merged

    def slow(op: TensorOp, inputs: TensorInputs) -> torch.Tensor:
        done.append(op.tensor)
        assert len(done) == 1 or go_on.wait(20)
        return merged(op, inputs)

    monkeypatch.setattr(merging, "_merged", slow)
    tensors = merger.materialize(plan_of(SETTINGS["ties"], sources))
    next(tensors)
    tensors.close()
    go_on.set()
    workers.pool(2).submit(int).result()
    assert len(done) <= 3  # the first, and one in each thread


@pytest.mark.skipif(not available(), reason="the loops that read sources as stored are compiled by numba")
def test_checkpoints_in_bfloat16_are_kept_as_they_are_stored():
    sources = MemorySources()
    merger = Merger(sources, cache_bytes=1 << 30)
    dict(merger.materialize(plan_of(SETTINGS["task arithmetic"], sources)))
    base = sum(tensor.nbytes for tensor in sources.base.values())
    models = sum(tensor.nbytes for tensor in sources.tuned.values())
    assert base + models <= merger.cached_bytes <= base + models + 64  # 64: what is not there


def test_a_cache_that_is_too_small_still_hits_and_keeps_its_limit():
    sources = MemorySources(torch.float32)
    base = sum(tensor.nbytes for tensor in sources.base.values())
    limit = base + 300 * 130 * 4 * 2 + 1000  # the base and two of the three large task vectors
    merger = Merger(sources, cache_bytes=limit)
    for _ in range(3):
        dict(merger.materialize(plan_of(SETTINGS["task arithmetic"], sources)))
        assert merger.cached_bytes <= limit
    large = sorted(sources.reads[model, "model.embed_tokens.weight"] for model in MODELS)
    assert large == [1, 1, 3]


def test_what_no_candidate_uses_any_more_makes_room():
    sources = MemorySources(torch.float32)
    embedding = "model.embed_tokens.weight"
    merger = Merger(sources, cache_bytes=sources.base[embedding].nbytes + 300 * 130 * 4)
    for model in ("math", "code", "code", "code"):
        plan = plan_of(Setting("task_arithmetic", {}, weighted(**{model: 1.0})), sources)
        dict(merger.materialize(plan, {embedding}))
    assert sources.reads["code", embedding] == 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    """Three models, an adapter among them; `same` equals the base."""
    folder = tmp_path_factory.mktemp("streamed")
    base = tiny_model(folder / "base")
    tiny_model(folder / "full", seed=1, noise_from=base, noise=0.05)
    tiny_model(folder / "same", seed=2, noise_from=base, noise=0.0)
    tiny_adapter(folder / "adapter", base, seed=3)
    refs = {"full": SourceRef(model=str(folder / "full")), "same": SourceRef(model=str(folder / "same"))}
    adapter = SourceRef(adapter=str(folder / "adapter"))
    return SourceSet.open(SourceRef(model=str(base)), {**refs, "adapter": adapter})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.streams])
def test_streamed_task_vectors_give_the_bits_of_whole_ones(name, checkpoints, monkeypatch):
    spec, layout = SPECS[name], checkpoints.layout()
    values = {key: 0.2 if key == "epsilon" else 0.5 for key in spec.per_model}
    names = checkpoints.models[: spec.max_models or 3]
    shared = {key: 0.3 for key, parameter in spec.shared.items() if parameter.default is None}
    setting = Setting(name, shared, {model: values for model in names})
    plan = MergePlan.compile(
        Recipe("base", checkpoints.models, dict.fromkeys(layout.by_cell, setting)), layout
    )
    whole = dict(Merger(checkpoints).materialize(plan))
    monkeypatch.setattr("evomerge.merge.merger.WHOLE_BYTES", 0)
    streamed = dict(Merger(checkpoints).materialize(plan))
    assert all(torch.equal(whole[tensor], streamed[tensor]) for tensor in whole)


def test_a_streamed_task_vector_is_read_by_slices_only(checkpoints, monkeypatch):
    name = "model.embed_tokens.weight"
    base = checkpoints.base_tensor(name).reshape(-1)
    sizes = []
    read = checkpoints.sources["full"].read_range

    def counted(tensor: str, low: int, high: int) -> torch.Tensor:
        sizes.append(high - low)
        return read(tensor, low, high)

    monkeypatch.setattr(checkpoints.sources["full"], "read_range", counted)
    monkeypatch.setattr("evomerge.sources.streamed.BLOCK", 100)
    streamed = checkpoints.streamed_delta("full", name, base)
    assert torch.equal(streamed[7:50], checkpoints.delta("full", name).reshape(-1)[7:50])
    assert max(sizes[:-1]) == 100


def test_a_model_that_leaves_a_tensor_alone_has_no_streamed_task_vector(checkpoints):
    base = checkpoints.base_tensor("model.embed_tokens.weight").reshape(-1)
    assert checkpoints.streamed_delta("same", "model.embed_tokens.weight", base) is None


def test_tensors_that_no_model_changes_are_the_bases_own():
    sources = MemorySources()
    plan = plan_of(Setting("ties", {}, weighted(chat=1.0)), sources)
    merged = dict(Merger(sources).materialize(plan))
    norm = "model.layers.0.input_layernorm.weight"
    assert merged[norm] is sources.base[norm]


def op_of(plan: MergePlan, tensor: str) -> TensorOp:
    return next(op for op in plan.ops if op.tensor == tensor)


def test_tensors_that_models_were_seen_to_leave_alone_depend_on_the_base_only():
    sources = MemorySources()
    merger, norm = Merger(sources), "model.layers.0.input_layernorm.weight"
    first, second = (plan_of(Setting("ties", {}, weighted(chat=w)), sources) for w in (1.0, 0.5))
    assert merger.digest(op_of(first, norm)) == op_of(first, norm).digest
    for _ in merger.materialize(first):
        pass
    held = {op.tensor: merger.digest(op) for op in first.ops}
    assert {op.tensor for op in merger.changed(second, held)} == set(SHAPES) - {norm}
    assert merger.changed(first, held) == []
    assert merger.changed(first, {}) == list(first.ops)


def test_a_method_that_does_not_keep_the_base_depends_on_its_weights_even_there():
    sources = MemorySources(torch.float32)
    merger, norm = Merger(sources), "model.layers.0.input_layernorm.weight"
    plan = plan_of(Setting("linear", {"normalize": False}, weighted(chat=0.5)), sources)
    for _ in merger.materialize(plan):
        pass
    assert merger.digest(op_of(plan, norm)) == op_of(plan, norm).digest


def test_linear_without_normalisation_scales_even_an_unchanged_tensor():
    sources = MemorySources(torch.float32)
    plan = plan_of(Setting("linear", {"normalize": False}, weighted(chat=0.5)), sources)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(dict(Merger(sources).materialize(plan))[norm], sources.base[norm] * 0.5)


def test_tensors_that_are_not_floating_pass_from_the_base():
    sources = MemorySources()
    merged = dict(Merger(sources).materialize(plan_of(SETTINGS["ties"], sources)))
    assert merged["model.position_ids"] is sources.base["model.position_ids"]


def varied(name: str) -> list[Setting]:
    """Settings of one method that follow each other in a search: other values, models and orders."""
    spec = SPECS[name]
    return [
        Setting(
            name,
            {key: value for key, value in shared.items() if key in spec.shared},
            {
                model: {key: value for key, value in values.items() if key in spec.per_model}
                for model in models
            },
        )
        for models, shared, values in [
            (MODELS, {}, {"weight": 0.5, "density": 0.3, "epsilon": 0.2}),
            (MODELS, {"select_topk": 0.5, "epsilon": 1e-3}, {"weight": 0.4, "density": 0.6, "gamma": 0.2}),
            (MODELS[1::-1], {"select_topk": 0.7, "r": 0.5}, {"weight": 0.4, "density": 0.5}),
        ]
    ]


@pytest.mark.parametrize(
    "name", ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl"]
)
def test_what_earlier_candidates_left_in_the_cache_does_not_change_a_bit(name):
    sources = MemorySources()
    merger = Merger(sources, cache_bytes=1 << 30)
    for setting in varied(name):
        plan = plan_of(setting, sources)
        fresh = dict(Merger(sources).materialize(plan))
        assert all(torch.equal(tensor, fresh[n]) for n, tensor in merger.materialize(plan))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_cell_and_tensor(value):
    sources = MemorySources()
    sources.tuned["math", UP][3, 3] = value
    plan = plan_of(Setting("task_arithmetic", {}, weighted(math=1.0)), sources)
    with pytest.raises(RecipeError, match=rf"layers\[0\].mlp, tensor `{UP}`: task_arithmetic .* not finite"):
        dict(Merger(sources).materialize(plan))


def test_a_value_that_overflows_only_the_checkpoints_dtype_is_refused():
    sources = MemorySources(torch.float16)
    plan = plan_of(Setting("task_arithmetic", {}, weighted(math=3e7)), sources)
    with pytest.raises(RecipeError, match=r"not finite in torch.float16"):
        dict(Merger(sources).materialize(plan))


def test_finite_values_whose_sum_overflows_are_allowed():
    sources = MemorySources(torch.float32)
    sources.base[UP] = torch.full(SHAPES[UP], 3e38)
    sources.tuned["math", UP] = torch.full(SHAPES[UP], 2e38)
    plan = plan_of(Setting("task_arithmetic", {}, weighted(math=0.5)), sources)
    assert dict(Merger(sources).materialize(plan))[UP].isfinite().all()


def test_a_plan_for_another_base_is_refused():
    sources = MemorySources()
    with pytest.raises(RecipeError, match="base model is `other`, but the sources' is `base`"):
        next(Merger(sources).materialize(plan_of(SETTINGS["ties"], sources, base="other")))
