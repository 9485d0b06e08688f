"""Promise 6: the exported YAML gives the same weights under mergekit 0.1.5, and under our own reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from evomerge.build import family_of
from evomerge.errors import ExportError
from evomerge.export.bundle import base_dtype, export_model
from evomerge.export.mergekit import _filters, mergekit_documents, mergekit_text, places
from evomerge.export.mergekit_merge import merge_mergekit
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet
from evomerge.space import SearchSpace
from tests.export.conftest import weights_of

Cells = dict[Cell, Setting]
MODELS = ("math", "code", "far", "lora", "odd")
OURS = ("compeft", "emr", "iso_c", "pcb", "tsvm", "widen")
ATTENTION, MLP, NORM = "attention", "mlp", "norm"
EMBEDDING, FINAL = Cell(None, "embedding"), Cell(None, NORM)


def weighted(**weights: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": weight} for name, weight in weights.items()}


def sparse(density: float, **weights: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": weight, "density": density} for name, weight in weights.items()}


def spread(layers: int, *modules: str, make: Callable[[int], Setting]) -> Cells:
    return {Cell(layer, module): make(layer) for layer in range(layers) for module in modules}


def arithmetic(**weights: float) -> Setting:
    return Setting("task_arithmetic", {}, weighted(**weights))


def linear(**weights: float) -> Setting:
    return Setting("linear", {}, weighted(**weights))


def slerp(t: float, *models: str) -> Setting:
    return Setting("slerp", {"t": t}, {model: {} for model in models})


def ties(density: float, **weights: float) -> Setting:
    return Setting("ties", {"lambda": 0.9}, sparse(density, **weights))


def multislerp(whole: bool = False, **weights: float) -> Setting:
    return Setting("multislerp", {"task_vectors": not whole}, weighted(**weights))


def nuslerp(whole: bool = False, flatten: bool = True, columns: bool = False) -> Setting:
    shared = {"task_vectors": not whole, "nuslerp_flatten": flatten, "nuslerp_row_wise": columns}
    return Setting("nuslerp", shared, weighted(math=0.6, far=1.1))


def unweighted(method: str, *models: str, **shared: float) -> Setting:
    return Setting(method, shared, {model: {} for model in models})


def together(method: str, **shared: float) -> Setting:
    return Setting(method, shared, {"math": {}, "code": {}, "far": {}})


def crumbs(method: str, density: float, gamma: float, **shared: bool) -> Setting:
    models = sparse(density, math=0.5, code=0.4, far=-0.1)
    return Setting(method, shared, {name: {**values, "gamma": gamma} for name, values in models.items()})


def everywhere(layers: int, setting: Setting) -> Cells:
    return {
        **spread(layers, ATTENTION, MLP, NORM, make=lambda _: setting),
        EMBEDDING: setting,
        FINAL: setting,
    }


@dataclass(frozen=True)
class Case:
    """A recipe's cells, how many documents it takes, and whether both sides round alike."""

    cells: Cells
    documents: int = 1
    bits: bool = True


# Bits differ where mergekit merges an adapter into a float32 copy first (base + delta is rounded, and the
# task vector counted back from it), where it adds the weights up in float32, where it takes norms in another
# order, and where magnitudes are equal.
CASES = {
    "linear_uniform": Case(everywhere(4, linear(math=1.0, code=1.0, far=1.0))),
    "linear_beside_the_base": Case(
        {
            **spread(4, ATTENTION, make=lambda i: linear(base=0.25, math=0.1 * i, code=0.4)),
            **spread(
                4, MLP, make=lambda i: Setting("linear", {"normalize": False}, weighted(far=0.5, code=0.5))
            ),
        }
    ),
    "arithmetic_by_layer_and_module": Case(
        {
            **spread(4, ATTENTION, make=lambda i: arithmetic(math=0.3 + 0.1 * i, code=-0.2)),
            **spread(4, MLP, make=lambda i: arithmetic(far=0.3333)),
            FINAL: arithmetic(math=1.5),
        }
    ),
    "arithmetic_with_adapters": Case(
        {
            **spread(4, ATTENTION, make=lambda i: arithmetic(math=0.4, lora=0.2 * i + 0.1, odd=0.7)),
            **spread(4, MLP, make=lambda i: arithmetic(code=0.25, lora=0.9)),
        },
        bits=False,
    ),
    "ties": Case(
        {
            **spread(4, ATTENTION, make=lambda i: ties(0.2 + 0.2 * i, math=1.0, code=0.7, far=0.3)),
            **spread(4, MLP, make=lambda i: ties(0.37, math=1.0, far=1.0)),
            EMBEDDING: Setting("ties", {"normalize": False, "rescale": True}, sparse(0.5, code=0.8, far=0.6)),
        },
        bits=False,
    ),
    "slerp_of_two": Case(
        {
            **spread(4, ATTENTION, MLP, NORM, make=lambda i: slerp(0.1 + 0.2 * i, "math", "far")),
            EMBEDDING: slerp(0.35, "math", "far"),
            FINAL: slerp(0.6, "math", "far"),
        },
        bits=False,
    ),
    "slerp_from_the_base": Case(
        spread(4, ATTENTION, MLP, make=lambda i: slerp(0.2 + 0.1 * i, "far")), bits=False
    ),
    "slerp_from_the_base_to_two_models": Case(
        {
            **spread(4, ATTENTION, make=lambda i: slerp(0.3, "far")),
            **spread(4, MLP, make=lambda i: slerp(0.3, "lora")),
        },
        documents=3,
        bits=False,
    ),
    "several_methods": Case(
        {
            **spread(2, ATTENTION, make=lambda i: slerp(0.4, "far", "code")),
            **spread(4, MLP, make=lambda i: ties(1.0, math=1.0, code=0.7, far=0.4)),
            **spread(4, NORM, make=lambda i: arithmetic(math=0.5, lora=0.5)),
            EMBEDDING: linear(math=1.0, code=3.0),
        },
        documents=5,
        bits=False,
    ),
    "ram_beside_the_base": Case(
        {
            **spread(4, ATTENTION, make=lambda i: together("ram", epsilon=0.0005 * i)),
            **spread(4, MLP, make=lambda i: together("ram")),
        }
    ),
    "ramplus_beside_the_base": Case(
        spread(4, ATTENTION, MLP, make=lambda i: together("ramplus_tl", epsilon=0.02, r=0.2 * i, alpha=0.7))
    ),
    "nothing_merged": Case({}),
}
EXACT_CASES = {
    "exact_arithmetic": Case(everywhere(3, arithmetic(math=0.7, code=0.4, far=-0.1))),
    "exact_ties": Case(everywhere(3, ties(0.4, math=1.0, code=0.7, far=0.3)), bits=False),
    "exact_breadcrumbs": Case(
        {
            **spread(3, ATTENTION, make=lambda i: crumbs("breadcrumbs", 0.3 + 0.2 * i, 0.05)),
            **spread(3, MLP, make=lambda i: crumbs("breadcrumbs", 0.9, 0.01, rescale=True)),
        },
        bits=False,
    ),
    "exact_breadcrumbs_ties": Case(everywhere(3, crumbs("breadcrumbs_ties", 0.4, 0.1)), bits=False),
    "exact_sce_beside_the_base": Case(
        {
            **spread(3, ATTENTION, make=lambda i: together("sce", select_topk=0.3 + 0.3 * i)),
            **spread(3, MLP, make=lambda i: together("sce")),
        },
        bits=False,
    ),
    "exact_slerp_and_copies": Case(
        spread(3, MLP, make=lambda i: slerp(0.3 + 0.25 * i, "math", "far")), documents=2, bits=False
    ),
    "exact_nuslerp_of_task_vectors": Case(
        {
            **everywhere(3, nuslerp()),
            **spread(3, ATTENTION, make=lambda i: nuslerp(flatten=False)),
            **spread(3, MLP, make=lambda i: nuslerp(flatten=False, columns=True)),
        },
        bits=False,
    ),
    # without `base_model` mergekit takes the config of any of the models, so a second document names the base
    "exact_nuslerp_of_models": Case(everywhere(3, nuslerp(whole=True)), documents=2, bits=False),
    "exact_multislerp_of_task_vectors": Case(
        {
            **everywhere(3, multislerp(math=1.0, code=0.5, far=0.25)),
            **spread(3, MLP, make=lambda i: multislerp(math=0.1 * i, far=0.4)),
        },
        bits=False,
    ),
    "exact_multislerp_of_models_and_karcher": Case(
        {
            **spread(3, ATTENTION, make=lambda i: multislerp(whole=True, math=1.0, code=0.1 * i, far=0.3)),
            **spread(3, MLP, make=lambda i: unweighted("karcher", "math", "code", "far")),
            EMBEDDING: unweighted("karcher", "math", "base", max_iter=20),
        },
        documents=4,
        bits=False,
    ),
    "exact_model_stock": Case(
        {
            **everywhere(3, unweighted("model_stock", "math", "code", "far")),
            **spread(
                3, MLP, make=lambda i: unweighted("model_stock", "math", "code", "far", filter_wise=True)
            ),
        },
        bits=False,
    ),
    "exact_nearswap": Case(
        spread(3, ATTENTION, MLP, make=lambda i: unweighted("nearswap", "far", t=0.01 * (i + 1)))
    ),
    "exact_fusion_and_passthrough": Case(
        {
            **spread(3, ATTENTION, MLP, make=lambda i: unweighted("arcee_fusion", "far")),
            **spread(3, NORM, make=lambda i: Setting("passthrough", {}, {"math": {"scale": 1.1 - 0.3 * i}})),
            EMBEDDING: Setting("passthrough", {}, {"base": {"scale": 0.7}}),
        },
        documents=4,
    ),
}
DARE = {
    **spread(4, ATTENTION, make=lambda i: Setting("dare_linear", {}, sparse(1.0, math=0.5, code=0.25))),
    **spread(4, MLP, make=lambda i: Setting("dare_linear", {}, sparse(0.5, math=0.5, code=0.25))),
}

# where `code` is absent, its most usual density and its most usual epsilon are one that mergekit refuses
THIN = [(0.9, 0.05), (0.9, 0.04), (0.5, 0.3), (0.6, 0.3)]
DELLA = {
    **spread(4, ATTENTION, make=lambda i: Setting("della", {}, sparse(1.0, math=0.5, far=0.25))),
    **spread(
        4,
        MLP,
        make=lambda i: Setting(
            "della",
            {},
            {
                "math": {"weight": 0.5, "density": 0.4, "epsilon": 0.2},
                "code": {"weight": 0.25, "density": THIN[i][0], "epsilon": THIN[i][1]},
            },
        ),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One case: the text written, and the tensors of mergekit, of our merge and of our reader."""

    text: str
    documents: int
    mergekit: Mapping[str, torch.Tensor]
    ours: Mapping[str, torch.Tensor]
    read: Mapping[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def outcomes(
    family: SourceSet,
    exact_family: SourceSet,
    mergekit: Callable[[Mapping[Path, str]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Outcome]:
    home = tmp_path_factory.mktemp("cases")
    commands, texts, counts = {}, {}, {}
    cases = {name: (family, case.cells) for name, case in CASES.items()}
    cases |= {name: (exact_family, case.cells) for name, case in EXACT_CASES.items()}
    cases |= {"dare": (family, DARE), "della": (family, DELLA)}
    for name, (sources, cells) in cases.items():
        recipe, layout = Recipe("base", sources.models, cells), sources.layout()
        folder = home / name
        export_model(folder / "ours", recipe, sources, layout, max_shard_bytes=10**9)
        documents = mergekit_documents(recipe, layout, SPECS, places(sources), base_dtype(sources))
        texts[folder], counts[folder] = mergekit_text(documents, SPECS), len(documents)
        (folder / "mergekit.yaml").write_text(texts[folder])
        commands[folder] = re.search(r"For mergekit 0\.1\.5: (.*)", texts[folder])[1]
        merge_mergekit(folder / "mergekit.yaml", folder / "read")
    mergekit(commands)
    return {
        folder.name: Outcome(
            texts[folder],
            counts[folder],
            *(weights_of(folder / where) for where in ("OUT", "ours", "read")),
            folder,
        )
        for folder in commands
    }


def bound(ours: torch.Tensor) -> torch.Tensor:
    """One step of the tensor's dtype, and the float32 rounding of sums that nearly cancel."""
    size = ours.double().abs()
    return size * (2**-7 if ours.dtype == torch.bfloat16 else 1e-6) + 1e-6 * float(size.max())


def differing(
    theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Per tensor, the entries further apart than `bound`; names, shapes and dtypes must be equal."""
    assert set(theirs) == set(ours)
    assert all(theirs[n].dtype == ours[n].dtype and theirs[n].shape == ours[n].shape for n in ours)
    return {name: (theirs[name].double() - ours[name].double()).abs() > bound(ours[name]) for name in ours}


def at_the_cut(sources: SourceSet, cells: Cells, name: str) -> torch.Tensor:
    """Entries that one of the models keeps or drops by its choice among equal magnitudes."""
    unclear = torch.zeros(sources.base.tensors[name].shape, dtype=torch.bool)
    for model, values in cells.get(sources.layout().cell(name), arithmetic()).models.items():
        delta = sources.delta(model, name)
        if delta is not None and values.get("density", 1.0) < 1.0:
            count = max(1, int(values["density"] * delta.numel()))
            unclear |= delta.abs() == delta.abs().flatten().sort(descending=True).values[count - 1]
    return unclear


@pytest.mark.parametrize("name", [name for name, case in (CASES | EXACT_CASES).items() if case.bits])
def test_mergekit_gives_the_same_bits(outcomes: dict[str, Outcome], name: str):
    ours, theirs = outcomes[name].ours, outcomes[name].mergekit
    assert set(ours) == set(theirs)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.bits and name != "ties"])
def test_mergekit_is_within_one_step(outcomes: dict[str, Outcome], name: str):
    outcome = outcomes[name]
    assert {n: int(d.sum()) for n, d in differing(outcome.mergekit, outcome.ours).items() if d.any()} == {}


@pytest.mark.parametrize("name", list(EXACT_CASES))
def test_in_float32_mergekit_is_within_a_millionth(outcomes: dict[str, Outcome], name: str):
    outcome = outcomes[name]
    assert {n: int(d.sum()) for n, d in differing(outcome.mergekit, outcome.ours).items() if d.any()} == {}


def test_ties_differ_only_in_the_choice_among_equal_magnitudes(
    family: SourceSet, outcomes: dict[str, Outcome]
):
    differ = differing(outcomes["ties"].mergekit, outcomes["ties"].ours)
    for name, entries in differ.items():
        assert not (entries & ~at_the_cut(family, CASES["ties"].cells, name)).any(), name
    assert sum(int(d.sum()) for d in differ.values()) < 0.01 * sum(d.numel() for d in differ.values())


@pytest.mark.parametrize("name", list(CASES | EXACT_CASES))
def test_the_number_of_documents(outcomes: dict[str, Outcome], name: str):
    assert outcomes[name].documents == (CASES | EXACT_CASES)[name].documents


# The pair's own first model is the base of a file that is read, so its sums are rounded in another order.
@pytest.mark.parametrize(
    "name", [n for n in CASES | EXACT_CASES if "slerp" not in n and n != "several_methods"]
)
def test_our_reader_gives_the_same_bits(outcomes: dict[str, Outcome], name: str):
    ours, read = outcomes[name].ours, outcomes[name].read
    assert set(ours) == set(read)
    assert [n for n in ours if not torch.equal(ours[n], read[n])] == []


@pytest.mark.parametrize("name", [n for n in CASES | EXACT_CASES if "slerp" in n or n == "several_methods"])
def test_our_reader_is_within_one_step(outcomes: dict[str, Outcome], name: str):
    assert not any(d.any() for d in differing(outcomes[name].read, outcomes[name].ours).values())


def test_cells_without_a_setting_keep_the_base_bit_by_bit(family: SourceSet, outcomes: dict[str, Outcome]):
    for name in ("arithmetic_with_adapters", "slerp_from_the_base", "several_methods"):
        kept = [
            n for c, names in family.layout().by_cell.items() if c not in CASES[name].cells for n in names
        ]
        assert kept
        for theirs in (outcomes[name].mergekit, outcomes[name].read):
            assert all(torch.equal(theirs[tensor], family.base_tensor(tensor)) for tensor in kept)


def test_mergekit_takes_config_and_tokenizer_from_the_base(outcomes: dict[str, Outcome]):
    folder = outcomes["several_methods"].folder
    theirs, ours = (json.loads((folder / o / "config.json").read_text()) for o in ("OUT", "ours"))
    assert theirs["dtype"] == ours["dtype"] == "bfloat16"
    assert theirs["tie_word_embeddings"]


@pytest.mark.parametrize("name", ["dare", "della"])
def test_a_random_method_says_that_masks_differ_and_agrees_where_nothing_is_dropped(
    family: SourceSet, outcomes: dict[str, Outcome], name: str
):
    outcome = outcomes[name]
    assert "Random masks" in outcome.text.split("merge_method")[0]
    dense = [t for c, names in family.layout().by_cell.items() if c.module != MLP for t in names]
    assert all(torch.equal(outcome.mergekit[name], outcome.ours[name]) for name in dense)


def test_fusion_says_that_mergekit_samples_large_tensors(outcomes: dict[str, Outcome]):
    assert "draws a sample" in outcomes["exact_fusion_and_passthrough"].text.split("merge_method")[0]
    assert "sample" not in outcomes["ties"].text


def test_models_merged_without_a_base_still_have_its_config(outcomes: dict[str, Outcome]):
    first, last = yaml.safe_load_all(outcomes["exact_nuslerp_of_models"].text)
    assert "base_model" not in first
    assert last["base_model"].endswith("base")


def test_a_method_without_masks_does_not_speak_of_them(outcomes: dict[str, Outcome]):
    assert "Random" not in outcomes["ties"].text


def test_every_method_that_mergekit_has_is_compared_with_it():
    cells = [case.cells for case in (CASES | EXACT_CASES).values()] + [DARE, DELLA]
    compared = {setting.method for case in cells for setting in case.values()}
    # dare_ties is ties with the masks of dare_linear, della_linear dare_linear with the masks of della:
    # no half is left out
    assert {name for name, spec in SPECS.items() if spec.mergekit} - compared <= {"dare_ties", "della_linear"}


def test_a_method_that_mergekit_has_not_is_refused(family: SourceSet):
    own = {**SPECS, "ties": replace(SPECS["ties"], mergekit=None)}
    recipe = Recipe("base", family.models, CASES["ties"].cells)
    with pytest.raises(ExportError, match=r"mergekit 0\.1\.5 has no method `ties`"):
        mergekit_documents(recipe, family.layout(), own, places(family), "bfloat16")


@pytest.mark.parametrize("method", OURS)
def test_a_method_of_ours_is_refused_and_merged_into_a_folder(family: SourceSet, tmp_path: Path, method: str):
    layout = family.layout()
    setting = Setting(method, {}, weighted(math=0.5, code=0.4, lora=0.3))
    recipe = Recipe("base", family.models, dict.fromkeys(layout.by_cell, setting))
    with pytest.raises(ExportError, match=f"mergekit 0.1.5 has no method `{method}`; merge with `evomerge"):
        mergekit_documents(recipe, layout, SPECS, places(family), "bfloat16")
    export_model(tmp_path / "model", recipe, family, layout, max_shard_bytes=10**9)
    plan = MergePlan.compile(recipe, layout)
    written = weights_of(tmp_path / "model")
    for name, tensor in Merger(family, cache_bytes=10**8).materialize(plan):
        assert torch.equal(written[name], tensor)
        assert not torch.equal(tensor, family.base_tensor(name))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_lines_are_one_document_with_a_value_per_layer(family: SourceSet, method: str):
    bounds = {"alpha": {"low": 0.0, "high": 1.0}, "beta": {"low": 0.0, "high": 1.0}}
    space = SearchSpace(
        layers={"lines": bounds}, outside="first", methods=[method], parameters={}, constants={"weight": 1.0}
    )
    layout = family.layout()
    recipe = space.bind(family_of(family, layout)).decode({"all.lines.alpha": 0.3, "all.lines.beta": 0.6})
    (document,) = mergekit_documents(recipe, layout, SPECS, places(family), "bfloat16")
    weights = document["models"][0]["parameters"]["weight"]
    for cell, names in layout.by_cell.items():
        for name in names:
            scale = first_match(document["parameters"]["lambda"], name) * first_match(weights, name)
            assert scale == pytest.approx(0.3 + 0.6 * (cell.layer or 0) / 3)


def test_a_path_that_mergekit_multi_cannot_read_is_refused(family: SourceSet):
    cells = {EMBEDDING: linear(odd=1.0), FINAL: arithmetic(odd=0.5)}
    recipe = Recipe("base", family.models, cells)
    with pytest.raises(ExportError, match=r"`odd` or the base has `\+` or `@` in its path.*rename"):
        mergekit_documents(recipe, family.layout(), SPECS, places(family), "bfloat16")


def first_match(rows: object, tensor: str) -> float:
    """mergekit's rule for a list of filters."""
    if not isinstance(rows, list):
        return rows
    return next(row["value"] for row in rows if "filter" not in row or row["filter"] in tensor)


NAMES = [
    *(f"model.layers.{i}.{part}" for i in (1, 2, 10, 12, 21) for part in ("mlp.up.weight", "attn.q.weight")),
    *("norm.weight", "final.norm.weight", "other.final.norm.weight", "model.layers.1.norm.weight"),
]


@pytest.mark.parametrize("seed", range(30))
def test_filters_give_every_tensor_its_value_even_where_names_contain_each_other(seed: int):
    """Every tensor a cell of its own, so that no two need agree."""
    layout = Layout(NAMES, {f"m{i}": [f"^{re.escape(name)}$"] for i, name in enumerate(NAMES)})
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, 2 + seed % 3, (len(NAMES),), generator=generator).tolist()
    values = {layout.cell(name): float(value) for name, value in zip(NAMES, draw, strict=True)}
    rows = _filters(values, layout)
    assert {name: first_match(rows, name) for name in NAMES} == dict(
        zip(NAMES, map(float, draw), strict=True)
    )


def test_one_value_per_module_takes_one_filter_per_module(family: SourceSet):
    layout = family.layout()
    values = {cell: {ATTENTION: 0.2, MLP: 0.3}.get(cell.module, 0.1) for cell in layout.by_cell}
    assert _filters(values, layout) == [
        {"filter": ".self_attn.", "value": 0.2},
        {"filter": ".mlp.", "value": 0.3},
        {"value": 0.1},
    ]


def test_the_text_is_plain_yaml_without_anchors(outcomes: dict[str, Outcome]):
    for outcome in outcomes.values():
        assert not re.search(r"[&*]id\d", outcome.text)
        assert len(list(yaml.safe_load_all(outcome.text))) == outcome.documents
