"""mergekit files read by us: the weights that mergekit makes of them, and errors where it would be silent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from evomerge.errors import ConfigError, ExportError, RecipeError
from evomerge.export.mergekit_merge import merge_mergekit
from evomerge.export.mergekit_reader import is_mergekit, read_mergekit
from evomerge.export.mergekit_values import ModelRef, Row
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.export.conftest import weights_of
from tests.tiny import tiny_model

# `math+` and so on stand for folders of the family, see `fill`
GRADIENTS_AND_FILTERS = """
merge_method: ties
base_model: {base}
models:
- model: {base}
- model: {math}
  parameters:
    weight:
    - {{filter: q_proj, value: [0.2, 0.9, 0.4, 1.3]}}
    - {{filter: self_attn, value: 0.6}}
    density: [0.3, 0.8]
- model: {code}
  parameters:
    weight: 0.5
    density: {{filter: mlp, value: 0.7}}
- model: {far}
parameters:
  weight: [{{filter: layers.2., value: 0.8}}, {{value: 0.35}}]
  density: 0.45
  normalize: [{{filter: up_proj, value: false}}, {{filter: "*", value: [true, true, false]}}]
  lambda: [1.2, 0.5]
  int8_mask: true
dtype: float32
"""
STAGES = """
merge_method: linear
base_model: one
models:
- {{model: one, parameters: {{weight: [{{filter: self_attn, value: 1.0}}, {{value: 0.0}}]}}}}
- {{model: two, parameters: {{weight: [{{filter: self_attn, value: 0.0}}, {{value: 1.0}}]}}}}
parameters: {{normalize: false}}
dtype: float32
out_dtype: float32
---
name: two
merge_method: slerp
base_model: {math}
models: [{{model: {math}}}, {{model: {far}}}]
parameters: {{t: [0.1, 0.8]}}
dtype: float32
out_dtype: float32
---
name: one
merge_method: task_arithmetic
base_model: {base}
models:
- {{model: {math}, parameters: {{weight: [0.2, 1.0]}}}}
- {{model: {code}, parameters: {{weight: 0.3}}}}
dtype: float32
out_dtype: float32
"""
# What `base_model` means differs: left out, listed, and one more input of the mean.
ROLES_OF_THE_BASE = """
merge_method: linear
base_model: {base}
models:
- {{model: one, parameters: {{weight: [{{filter: q_proj, value: 1.0}}, {{value: 0.0}}]}}}}
- {{model: two, parameters: {{weight: [{{filter: k_proj, value: 1.0}}, {{value: 0.0}}]}}}}
- {{model: three, parameters: {{weight: [{{filter: mlp, value: 1.0}}, {{value: 0.0}}]}}}}
- {{model: four, parameters: {{weight: [{{filter: embed, value: 1.0}}, {{value: 0.0}}]}}}}
- {{model: {base}, parameters: {{weight: 0.0}}}}
parameters: {{normalize: false}}
dtype: float32
---
name: one
merge_method: nuslerp
models: [{{model: {math}}}, {{model: {far}}}]
parameters: {{weight: [0.1, 0.8]}}
dtype: float32
---
name: two
merge_method: multislerp
base_model: {base}
models: [{{model: {base}}}, {{model: {math}}}, {{model: {far}}}]
parameters: {{weight: 1.0, eps: 1.0e-08}}
dtype: float32
---
name: three
merge_method: karcher
base_model: {base}
models: [{{model: {math}}}, {{model: {far}}}]
parameters: {{max_iter: 5}}
dtype: float32
---
name: four
merge_method: passthrough
base_model: {math}
models: [{{model: {math}, parameters: {{scale: 0.5}}}}]
dtype: float32
"""
ADAPTER_ON_AN_EXPERT = """
merge_method: linear
models:
- {{model: "{math}+{lora}", parameters: {{weight: 0.75}}}}
- {{model: {{model: {{path: {code}}}}}, parameters: {{weight: 0.5}}}}
dtype: float32
out_dtype: bfloat16
"""
ADAPTED_BASE = """
merge_method: task_arithmetic
base_model: {base}+{lora}
models:
- {{model: {math}, parameters: {{weight: 0.6}}}}
- {{model: {base}, parameters: {{weight: 0.2}}}}
dtype: float32
out_dtype: float16
"""
PLAIN = """
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {math}, parameters: {{weight: 0.6}}}}, {{model: {far}, parameters: {{weight: 0.7}}}}]
"""
ONE_LAYER = """
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {math}, parameters: {{weight: [0.2, 0.7, 0.9]}}}}]
dtype: float32
"""
COMMAND = {
    "stages": "mergekit-multi file.yaml -I $PWD/STAGES --out-path OUT",
    "roles": "mergekit-multi file.yaml -I $PWD/STAGES --out-path OUT",
    "other": "mergekit-yaml file.yaml OUT --lora-merge-cache CACHE --lora-merge-dtype float32",
}


def fill(text: str, sources: SourceSet) -> str:
    return text.format(**sources.folders).strip() + "\n"


def written(folder: Path, text: str, sources: SourceSet) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "file.yaml"
    path.write_text(fill(text, sources))
    return path


@pytest.fixture(scope="module")
def pairs(
    family: SourceSet,
    exact_family: SourceSet,
    mergekit: Callable[[Mapping[Path, str]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    """Per file, the folders that mergekit and evomerge wrote."""
    home = tmp_path_factory.mktemp("files")
    base = tiny_model(home / "base", layers=1, dtype=torch.float32)
    math = SourceRef(model=str(tiny_model(home / "math", 1, noise_from=base)))
    one_layer = SourceSet.open(SourceRef(model=str(base)), {"math": math})
    files = {
        "gradients": (GRADIENTS_AND_FILTERS, exact_family),
        "stages": (STAGES, exact_family),
        "roles": (ROLES_OF_THE_BASE, exact_family),
        "adapter": (ADAPTER_ON_AN_EXPERT, family),
        "adapted_base": (ADAPTED_BASE, family),
        "one_layer": (ONE_LAYER, one_layer),
    }
    commands = {}
    for name, (text, sources) in files.items():
        path = written(home / name, text, sources)
        merge_mergekit(path, home / name / "ours")
        commands[home / name] = COMMAND.get(name, COMMAND["other"])
    mergekit(commands)
    return {name: (home / name / "OUT", home / name / "ours") for name in files}


@pytest.mark.parametrize("name", ["gradients", "stages", "roles", "adapter", "adapted_base", "one_layer"])
def test_weights_are_mergekits(pairs: dict[str, tuple[Path, Path]], name: str):
    theirs, ours = map(weights_of, pairs[name])
    assert set(theirs) == set(ours)
    step = {"adapter": 2**-7, "adapted_base": 2**-10}.get(name, 1e-6)
    for tensor, value in ours.items():
        assert value.dtype == theirs[tensor].dtype
        largest = float(value.abs().max())
        torch.testing.assert_close(value, theirs[tensor], rtol=step, atol=1e-6 * largest, msg=tensor)


@pytest.mark.parametrize(
    ("name", "dtype"), [("gradients", "float32"), ("adapter", "bfloat16"), ("adapted_base", "float16")]
)
def test_config_names_the_dtype_written(pairs: dict[str, tuple[Path, Path]], name: str, dtype: str):
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in pairs[name])
    assert ours["dtype"] == theirs["dtype"] == dtype
    assert {str(tensor.dtype) for tensor in weights_of(pairs[name][1]).values()} == {f"torch.{dtype}"}


def test_a_selection_copies_its_stages_bit_by_bit(
    pairs: dict[str, tuple[Path, Path]], exact_family: SourceSet, tmp_path: Path
):
    stage = STAGES.split("---")[1].replace("name: two\n", "")
    alone = weights_of(merge_mergekit(written(tmp_path / "a", stage, exact_family), tmp_path / "out"))
    selected = weights_of(pairs["stages"][1])
    assert all(torch.equal(alone[name], selected[name]) for name in alone if "self_attn" not in name)


def test_a_stage_may_merge_a_model_with_an_adapter(family: SourceSet, tmp_path: Path):
    stage = ADAPTER_ON_AN_EXPERT.replace("bfloat16", "float32")
    alone = weights_of(merge_mergekit(written(tmp_path / "a", stage, family), tmp_path / "alone"))
    last = "merge_method: passthrough\nmodels: [{{model: one}}]\ndtype: float32\n---\nname: one"
    staged = weights_of(merge_mergekit(written(tmp_path / "b", last + stage, family), tmp_path / "staged"))
    assert all(torch.equal(alone[name], staged[name]) for name in alone)


def test_stages_are_removed(pairs: dict[str, tuple[Path, Path]]):
    folder = pairs["stages"][1].parent
    assert sorted(path.name for path in folder.iterdir()) == ["OUT", "STAGES", "file.yaml", "ours"]


def test_stages_are_removed_after_a_failure(family: SourceSet, tmp_path: Path):
    path = written(tmp_path / "a", STAGES.replace("{far}", "/no/such/folder"), family)
    with pytest.raises(Exception, match="no/such/folder"):
        merge_mergekit(path, tmp_path / "a" / "ours")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file.yaml"]


def test_without_a_dtype_every_tensor_has_the_bases(family: SourceSet, tmp_path: Path):
    out = merge_mergekit(written(tmp_path / "a", PLAIN, family), tmp_path / "out")
    assert all(t.dtype == family.base_tensor(name).dtype for name, t in weights_of(out).items())


def test_a_low_dtype_is_cast_to_once_and_not_computed_in(family: SourceSet, tmp_path: Path):
    low = merge_mergekit(written(tmp_path / "a", PLAIN + "dtype: float16\n", family), tmp_path / "a" / "out")
    high = merge_mergekit(written(tmp_path / "b", PLAIN + "dtype: float32\n", family), tmp_path / "b" / "out")
    low_weights, high_weights = weights_of(low), weights_of(high)
    assert all(torch.equal(low_weights[name], high_weights[name].half()) for name in low_weights)


def test_values_that_float16_cannot_hold_are_refused(family: SourceSet, tmp_path: Path):
    text = PLAIN.replace("0.6", "1.0e+7") + "dtype: float32\nout_dtype: float16\n"
    with pytest.raises(RecipeError, match=r"float16 cannot hold; write bfloat16 .*`out_dtype`"):
        merge_mergekit(written(tmp_path / "a", text, family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_beside_the_file_is_found(family: SourceSet, tmp_path: Path):
    base = tiny_model(tmp_path / "models" / "base")
    tiny_model(tmp_path / "models" / "tuned", 1, noise_from=base)
    path = tmp_path / "file.yaml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: models/base\n"
        "models: [{model: models/tuned, parameters: {weight: 0}}]\n"
    )
    out = merge_mergekit(path, tmp_path / "out")
    theirs = weights_of(base)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights_of(out).items())


def test_masks_depend_on_the_seed_only(family: SourceSet, tmp_path: Path):
    text = PLAIN.replace("task_arithmetic", "dare_linear") + "parameters: {{density: 0.5}}\n"
    path = written(tmp_path / "a", text, family)
    one, again, other = (
        weights_of(merge_mergekit(path, tmp_path / name, seed=seed))
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].dim() == 2)


def test_an_output_folder_in_use_is_refused_before_anything_is_read(family: SourceSet, tmp_path: Path):
    path = written(tmp_path / "a", PLAIN, family)
    with pytest.raises(ExportError, match="is not an empty folder"):
        merge_mergekit(path, tmp_path / "a")


def test_the_card_shows_the_file(family: SourceSet, tmp_path: Path):
    out = merge_mergekit(written(tmp_path / "a", PLAIN, family), tmp_path / "out")
    assert fill(PLAIN, family) in (out / "README.md").read_text()


def test_asking_for_the_bases_tokenizer_changes_nothing_where_every_row_has_a_token(
    family: SourceSet, tmp_path: Path
):
    plain = weights_of(merge_mergekit(written(tmp_path / "a", PLAIN, family), tmp_path / "a" / "out"))
    text = PLAIN + "tokenizer_source: base\n"
    asked = weights_of(merge_mergekit(written(tmp_path / "b", text, family), tmp_path / "b" / "out"))
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_asking_for_a_tokenizer_that_would_cut_rows_off_is_refused(tmp_path: Path):
    base = tiny_model(tmp_path / "base", vocab=136)
    path = tmp_path / "file.yaml"
    path.write_text(f"tokenizer_source: base\n{NAMED % base}")
    with pytest.raises(RecipeError, match="136 rows"):
        merge_mergekit(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("points", "t", "value"),
    [
        ((0.0, 1.0, 3.0), 0.25, 0.5),
        ((0.0, 1.0, 3.0), 0.75, 2.0),
        ((0.0, 1.0, 3.0), 1.0, 3.0),
        ((0.7,), 0.3, 0.7),
        ((True, False), 0.99, True),
        ((True, False), 1.0, False),
    ],
)
def test_a_gradient_is_linear_in_depth_and_booleans_step(points: tuple[float, ...], t: float, value: float):
    assert Row(None, points).at(t) == pytest.approx(value)


def test_the_first_filter_that_matches_wins_then_the_next_level_then_the_default(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text(
        """
merge_method: ties
base_model: b
models:
- model: m
  parameters: {weight: [{filter: mlp, value: 1}, {filter: up, value: 2}], density: {filter: up, value: 0.25}}
parameters: {weight: 3}
"""
    )
    (document,) = read_mergekit(path)
    names = {ModelRef("m"): "m"}
    values = {name: document.setting(name, 0.0, names).models["m"] for name in ("mlp.up", "x.up", "attn")}
    assert values["mlp.up"] == {"weight": 1.0, "density": 0.25}
    assert values["x.up"] == {"weight": 2.0, "density": 0.25}
    assert values["attn"] == {"weight": 3.0, "density": 1.0}


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/m", ModelRef("org/m")),
        ("org/m@v1", ModelRef("org/m", "v1")),
        ("org/m+org/l", ModelRef("org/m", None, "org/l")),
        ("org/m@v1+org/l@v2", ModelRef("org/m", "v1", "org/l", "v2")),
        ("{model: {path: /a+b, revision: v1}, lora: {path: /c@d}}", ModelRef("/a+b", "v1", "/c@d")),
    ],
)
def test_model_references(tmp_path: Path, text: str, ref: ModelRef):
    path = tmp_path / "file.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {text}, parameters: {{weight: 1}}}}]\n")
    assert read_mergekit(path)[0].models[0][0] == ref


HEAD = "merge_method: ties\nbase_model: b\n"
MODEL = "models: [{model: m, parameters: {weight: 1}}]\n"
NAMED = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "slices: []\n", "`slices` is \\[\\], but it must be a list"),
        (HEAD + MODEL + "modules: {}\n", "`modules` is not supported yet"),
        (HEAD + MODEL + "chat_template: auto\n", "`chat_template` is not supported yet"),
        (HEAD + MODEL + "tokenizer_source: union\n", "`tokenizer_source` is 'union', which is not supported"),
        (
            HEAD + MODEL + "tokenizer: {source: base, pad_to_multiple_of: 8}\n",
            "`tokenizer` is .* not supported",
        ),
        (HEAD + MODEL + "parameter: {lambda: 2}\n", "unknown key `parameter`; did you mean `parameters`"),
        (HEAD + MODEL + "parameters: {lamda: 2}\n", "unknown parameter `lamda`; did you mean `lambda`"),
        (HEAD + "models: [{model: m, weight: 1}]\n", r"models\[0\].*unknown key `weight`"),
        (HEAD + "models: [{model: m, parameters: {weigth: 1}}]\n", "`weigth`; did you mean `weight`"),
        (HEAD + "models: [{model: m, parameters: {lambda: 1}}]\n", "`lambda` holds for all models"),
        (HEAD + "models: [{model: m, parameters: {weight: big}}]\n", "`weight` is 'big', but it must be"),
        (HEAD + "models: [{model: m, parameters: {weight: []}}]\n", "must be a number"),
        (HEAD + "models: [{model: m, parameters: {weight: [1, true]}}]\n", "must be a number"),
        (HEAD + "models: [{model: m, parameters: {weight: [{filter: a}]}}]\n", "mapping with `value`"),
        (HEAD + "models: [{model: m}, {model: m}]\n", "`m` again"),
        (
            HEAD + "models: [{model: {model: {path: m}, override_architecture: X}}]\n",
            "`override_architecture`",
        ),
        (HEAD + MODEL + "dtype: float64\n", "`dtype` is 'float64'; evomerge writes"),
        (HEAD + MODEL + "out_dtype: int8\n", "`out_dtype` is 'int8'"),
        (HEAD, "`models` is None"),
        ("merge_method: ties\n" + MODEL, "`base_model` is missing, and ties needs one"),
        ("merge_method: slerp\nmodels: [{model: m}]\n", "`base_model` is missing"),
        (
            "merge_method: frankenmerge\n" + MODEL,
            "`frankenmerge`, which evomerge has not got; it has: .*ties",
        ),
        (
            "merge_method: slerp\nbase_model: b\nmodels: [{model: m}, {model: n}]\n",
            "slerp has 2 models beside",
        ),
        ("merge_method: linear\nbase_model: b\n" + MODEL, "`base_model` is not one of `models`"),
        ("merge_method: nearswap\nmodels: [{model: m}]\n", "`base_model` is missing, and nearswap needs one"),
        (
            "merge_method: passthrough\nbase_model: b\nmodels: [{model: m}]\n",
            "`base_model` is not the model of passthrough.*remove it",
        ),
        (
            "merge_method: nuslerp\nbase_model: b\n" + MODEL + "parameters: {task_vectors: false}\n",
            "unknown parameter `task_vectors`",
        ),
        (f"name: a\n{NAMED % 'b'}---\nname: b\n{NAMED % 'a'}---\n{NAMED % 'a'}", "uses itself"),
        (f"name: a\n{NAMED % 'x'}---\n{NAMED % 'y'}", "document 1: the result does not use `a`"),
        (f"name: a\n{NAMED % 'x'}---\nname: b\n{NAMED % 'a'}", "every document has a `name`"),
        (f"{NAMED % 'x'}---\n{NAMED % 'y'}", "two documents have the same `name`"),
        (f"name: 3\n{NAMED % 'x'}", "`name` is 3, but it must be text"),
    ],
)
def test_what_mergekit_would_ignore_or_we_cannot_do_is_an_error(tmp_path: Path, text: str, message: str):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as raised:
        read_mergekit(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_weight_names_the_tensor(family: SourceSet, tmp_path: Path):
    text = PLAIN.replace("{{weight: 0.6}}", "{{weight: {{filter: mlp, value: 1}}}}")
    with pytest.raises(
        RecipeError, match=r"tensor `model\.embed_tokens\.weight`.*task_arithmetic needs `weight`"
    ):
        merge_mergekit(written(tmp_path / "a", text, family), tmp_path / "out")


def test_a_value_out_of_range_is_refused(family: SourceSet, tmp_path: Path):
    text = PLAIN.replace("task_arithmetic", "ties") + "parameters: {{density: [0.5, 1.5]}}\n"
    with pytest.raises(RecipeError, match=r"density is 1\.\d+, but it is the fraction"):
        merge_mergekit(written(tmp_path / "a", text, family), tmp_path / "out")


def test_the_two_kinds_of_file_are_told_apart(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text("evomerge_recipe: 1\n")
    assert not is_mergekit(path)
    path.write_text(NAMED % "x")
    assert is_mergekit(path)


@pytest.mark.parametrize("text", ["base_model: x\n", "", "- 1\n"])
def test_a_file_of_neither_kind_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="`evomerge_recipe`, nor a mergekit file"):
        is_mergekit(path)


def test_a_key_given_twice_is_refused(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text("merge_method: linear\nmerge_method: ties\n")
    with pytest.raises(ConfigError, match="`merge_method` is given twice"):
        is_mergekit(path)


def test_the_merge_command_takes_both_kinds_of_file(family: SourceSet, tmp_path: Path):
    from evomerge.export.recipe_file import recipe_document, write_yaml
    from evomerge.model import merge_model
    from evomerge.recipe import Recipe, Setting

    setting = Setting("task_arithmetic", {}, {"math": {"weight": 0.6}, "far": {"weight": 0.7}})
    recipe = Recipe("base", family.models, dict.fromkeys(family.layout().by_cell, setting))
    write_yaml(tmp_path / "recipe.yaml", recipe_document(recipe, family))
    ours = weights_of(merge_model(tmp_path / "recipe.yaml", tmp_path / "ours"))
    theirs = weights_of(merge_model(written(tmp_path / "a", PLAIN, family), tmp_path / "theirs"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
