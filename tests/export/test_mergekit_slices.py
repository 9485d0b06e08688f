"""Slices of mergekit files: the weights that mergekit makes of them, config.json, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import CompatibilityError, EvomergeError, ExportError, RecipeError
from evomerge.export.layer_config import layered_config
from evomerge.export.mergekit_merge import merge_mergekit
from evomerge.export.mergekit_reader import read_mergekit
from evomerge.sources.source_set import SourceSet
from tests.export.conftest import weights_of
from tests.tiny import tiny_adapter, tiny_model

# `{base}` and so on stand for folders: three layers each; `{deep}` has five
FRANKENMERGE = """
merge_method: passthrough
base_model: {base}
slices:
- sources: [{{model: {math}, layer_range: [0, 2]}}]
- sources:
  - model: {code}
    layer_range: [1, 3]
    parameters:
      scale: [{{filter: o_proj, value: [0.5, 0.25]}}, {{filter: layers.1.mlp.down_proj, value: 0}}]
- sources:
  - model: {deep}
    layer_range: [4, 5]
    parameters: {{scale: [{{filter: norm, value: 1}}, {{value: 3}}]}}
- sources: [{{model: {far}, layer_range: [2, 3]}}]
dtype: float32
"""
SHORTER = """
merge_method: passthrough
slices:
- sources: [{{model: {math}, layer_range: [2, 3]}}]
- sources: [{{model: {code}, layer_range: [0, 0]}}]
base_model: {base}
dtype: float32
"""
PAIRED_DEPTHS = """
merge_method: task_arithmetic
base_model: {base}
slices:
- sources:
  - {{model: {base}, layer_range: [0, 2]}}
  - model: {math}
    layer_range: [0, 2]
    parameters: {{weight: [{{filter: layers.1., value: 0.9}}, {{value: [0.1, 0.2]}}]}}
  - {{model: {code}, layer_range: [0, 2]}}
- sources:
  - {{model: {base}, layer_range: [1, 2]}}
  - model: {deep}
    layer_range: [3, 4]
    parameters: {{weight: [{{filter: layers.2., value: 9}}, {{filter: layers.3., value: [0.4, 0.7]}}]}}
  - {{model: {math}, layer_range: [0, 1], parameters: {{weight: [0.25, 0.75]}}}}
  parameters: {{weight: 0.3}}
- base_model: {far}
  sources:
  - {{model: {code}, layer_range: [1, 3], parameters: {{weight: {{filter: mlp, value: 0.6}}}}}}
  - {{model: {far}, layer_range: [0, 2]}}
  - {{model: {math}, layer_range: [1, 3], parameters: {{weight: [0.3, 0.5]}}}}
  parameters:
    weight: {{filter: self_attn, value: 0.15}}
    lambda: [{{filter: layers.4., value: 2}}, {{filter: layers.1., value: 3}}]
parameters: {{lambda: [{{filter: layers.3.self_attn, value: 1.5}}, {{value: [1, 0.5]}}], weight: [0.7, 0.8]}}
dtype: float32
"""
TIES_IN_PLACE = """
merge_method: ties
base_model: {base}
slices:
- sources:
  - {{model: {base}, layer_range: [0, 2]}}
  - {{model: {math}, layer_range: [0, 2], parameters: {{weight: [0.2, 0.9], density: 0.5}}}}
  - {{model: {far}, layer_range: [0, 2], parameters: {{weight: {{filter: mlp, value: 0.4}}}}}}
  parameters: {{normalize: [true, false], weight: 0.6}}
- sources: [{{model: {base}, layer_range: [2, 3]}}, {{model: {code}, layer_range: [2, 3]}}]
parameters: {{density: [0.3, 0.8], weight: 0.5}}
dtype: float32
"""
SLERP_BASE_LAST = """
merge_method: slerp
base_model: {base}
slices:
- sources: [{{model: {far}, layer_range: [0, 2]}}, {{model: {base}, layer_range: [0, 2]}}]
- sources: [{{model: {math}, layer_range: [1, 3]}}, {{model: {base}, layer_range: [0, 2]}}]
parameters: {{t: [0.2, 0.6]}}
dtype: float32
"""
LINEAR_BASE_ASIDE = """
merge_method: linear
base_model: {base}
slices:
- sources:
  - {{model: {math}, layer_range: [0, 2], parameters: {{weight: [0.2, 0.9]}}}}
  - {{model: {far}, layer_range: [1, 3], parameters: {{weight: 0.5}}}}
- sources:
  - {{model: {code}, layer_range: [2, 3], parameters: {{weight: 0}}}}
  - {{model: {math}, layer_range: [2, 3], parameters: {{weight: 1}}}}
dtype: float32
"""
ADAPTERS = """
merge_method: passthrough
base_model: {base}
slices:
- sources: [{{model: "{base}+{lora}", layer_range: [0, 2]}}]
- sources: [{{model: "{math}+{lora}", layer_range: [1, 3]}}]
- sources: [{{model: {base}, layer_range: [2, 3]}}]
dtype: float32
"""
ADAPTED_DELTAS = """
merge_method: task_arithmetic
base_model: {base}
slices:
- sources:
  - {{model: {base}, layer_range: [0, 2]}}
  - {{model: "{base}+{lora}", layer_range: [0, 2], parameters: {{weight: 0.5}}}}
- sources:
  - {{model: {base}, layer_range: [0, 2]}}
  - {{model: "{base}+{lora}", layer_range: [1, 3], parameters: {{weight: 0.5}}}}
dtype: float32
"""
FILES = {
    "frankenmerge": FRANKENMERGE,
    "shorter": SHORTER,
    "paired_depths": PAIRED_DEPTHS,
    "ties_in_place": TIES_IN_PLACE,
    "slerp": SLERP_BASE_LAST,
    "linear": LINEAR_BASE_ASIDE,
    "adapters": ADAPTERS,
    "adapted_deltas": ADAPTED_DELTAS,
}
EXACT = ("frankenmerge", "shorter", "paired_depths")
COMMAND = "mergekit-yaml file.yaml OUT --lora-merge-cache CACHE --lora-merge-dtype float32"


@pytest.fixture(scope="module")
def folders(exact_family: SourceSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of three layers, one of five, and an adapter."""
    home = tmp_path_factory.mktemp("slices")
    deep = tiny_model(home / "deep", 11, tied=False, dtype=torch.float32, layers=5)
    lora = tiny_adapter(home / "lora", exact_family.folders["base"], 12, targets=("q_proj", "lm_head"))
    return {**exact_family.folders, "deep": deep, "lora": lora}


def written(folder: Path, text: str, folders: Mapping[str, Path]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "file.yaml"
    path.write_text(text.format(**folders))
    return path


@pytest.fixture(scope="module")
def pairs(
    folders: dict[str, Path],
    mergekit: Callable[[Mapping[Path, str]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    """Per file, the folders that mergekit and evomerge wrote."""
    home = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        merge_mergekit(written(home / name, text, folders), home / name / "ours")
    mergekit({home / name: COMMAND for name in FILES})
    return {name: (home / name / "OUT", home / name / "ours") for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_mergekits(pairs: dict[str, tuple[Path, Path]], name: str):
    theirs, ours = map(weights_of, pairs[name])
    assert set(theirs) == set(ours)
    for tensor, value in ours.items():
        largest = float(value.abs().max())
        rtol, atol = (0.0, 0.0) if name in EXACT else (1e-6, 1e-6 * largest)
        torch.testing.assert_close(value, theirs[tensor], rtol=rtol, atol=atol, msg=tensor)


@pytest.mark.parametrize("name", FILES)
def test_config_is_mergekits_but_for_the_program_that_wrote_it(
    pairs: dict[str, tuple[Path, Path]], name: str
):
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in pairs[name])
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]
    assert {key: theirs[key] for key in ours if key in theirs and key != "transformers_version"} == {
        key: ours[key] for key in ours if key in theirs and key != "transformers_version"
    }


def test_a_deeper_model_generates_with_transformers(pairs: dict[str, tuple[Path, Path]]):
    import transformers

    folder = pairs["frankenmerge"][1]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(model.model.layers) == 6
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("the ", return_tensors="pt")
    tokens = model.generate(input_ids=inputs.input_ids, max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape[1] == inputs.input_ids.shape[1] + 4


def test_a_stage_with_slices_can_be_used_by_another_document(folders: dict[str, Path], tmp_path: Path):
    text = (
        FRANKENMERGE.replace("\ndtype", "\nname: tall\ndtype")
        + "---\n"
        + (
            "merge_method: passthrough\nbase_model: tall\nslices:\n"
            "- sources: [{{model: tall, layer_range: [3, 6]}}]\n"
            "- sources: [{{model: {base}, layer_range: [0, 1]}}]\n"
        )
    )
    result = weights_of(merge_mergekit(written(tmp_path / "a", text, folders), tmp_path / "a" / "out"))
    tall = weights_of(merge_mergekit(written(tmp_path / "b", FRANKENMERGE, folders), tmp_path / "b" / "out"))
    name = "model.layers.{}.self_attn.o_proj.weight"
    assert torch.equal(result[name.format(1)], tall[name.format(4)])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file.yaml", "out"]


def test_a_merge_of_slices_goes_on_at_its_first_missing_shard(folders: dict[str, Path], tmp_path: Path):
    path = written(tmp_path / "a", FRANKENMERGE, folders)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("wrote model-00002"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_mergekit(path, tmp_path / "out", max_shard_bytes=60_000, say=stop)
    lines.clear()
    out = merge_mergekit(path, tmp_path / "out", max_shard_bytes=60_000, say=lines.append)
    assert lines[0].startswith("going on")
    assert "wrote model-00002" not in " ".join(lines)
    whole = weights_of(merge_mergekit(path, tmp_path / "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights_of(out).items())
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6


def test_other_slices_do_not_go_on_with_an_unfinished_merge(folders: dict[str, Path], tmp_path: Path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_mergekit(
            written(tmp_path / "a", FRANKENMERGE, folders), tmp_path / "out", max_shard_bytes=60_000, say=stop
        )
    lines: list[str] = []
    other = written(tmp_path / "a", FRANKENMERGE.replace("[2, 3]", "[1, 2]"), folders)
    merge_mergekit(other, tmp_path / "out", max_shard_bytes=60_000, say=lines.append)
    assert lines[0].startswith("wrote model-00001")


def test_large_tensors_are_merged_slice_by_slice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = written(tmp_path / "a", PAIRED_DEPTHS, folders)
    held = weights_of(merge_mergekit(path, tmp_path / "held"))
    monkeypatch.setattr("evomerge.merge.merger.WHOLE_BYTES", 0)
    streamed = weights_of(merge_mergekit(path, tmp_path / "streamed"))
    assert all(torch.equal(tensor, held[name]) for name, tensor in streamed.items())


def test_lists_of_config_json_follow_the_layers(exact_family: SourceSet):
    config = {**exact_family.base.config, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2, 3]}
    base = type("Base", (), {"config": config})()
    sources = type("Sources", (), {"base": base, "checkpoint": lambda self, model: base})()
    made = layered_config(sources, [("base", 2), ("base", 0), ("base", 2), ("base", 1)], "file")
    assert made["layer_types"] == ["c", "a", "c", "b"]
    assert made["num_hidden_layers"] == 4
    assert made["eos_token_id"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("entry", "fine", "wrong"),
    [
        ({"first_k_dense_replace": 1}, [0, 1, 2, 1, 2], [0, 0, 1]),
        ({"sliding_window_pattern": 2}, [2, 1, 0], [0, 2]),
        ({"mlp_only_layers": [1]}, [2, 1], [1, 2]),
    ],
)
def test_a_layer_may_not_change_its_kind(
    exact_family: SourceSet, entry: Mapping[str, object], fine: list[int], wrong: list[int]
):
    base = type("Base", (), {"config": {**exact_family.base.config, **entry}})()
    sources = type("Sources", (), {"base": base, "checkpoint": lambda self, model: base})()
    assert layered_config(sources, [("base", n) for n in fine], "file")["num_hidden_layers"] == len(fine)
    with pytest.raises(RecipeError, match=f"file: config.json has `{next(iter(entry))}.*another kind"):
        layered_config(sources, [("base", n) for n in wrong], "file")


HEAD = "merge_method: task_arithmetic\nbase_model: b\nslices:\n"
BASE = "{model: b, layer_range: [0, 2]}"
GOOD = "{model: m, layer_range: [0, 2], parameters: {weight: 1}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEAD + f"- sources: [{BASE}, {GOOD}]\nmodels: [{{model: m}}]\n",
            "`models` and `slices`.*one of the two",
        ),
        (HEAD + "- {}\n", r"`slices\[0\]` is {}, but it must be a mapping with the key `sources`"),
        (HEAD + "- sources: []\n", r"`slices\[0\]`, `sources` is \[\], but it must be a list with entries"),
        (
            HEAD + f"- sources: [{BASE}]\n  base_mode: b\n",
            r"`slices\[0\]`: unknown key `base_mode`; did you mean `base_model`",
        ),
        (HEAD + f"- sources: [{BASE}]\n  residual_weight: 1\n", "unknown key `residual_weight`"),
        (HEAD + f"- sources: [{BASE}, {{model: m, layer_rang: [0, 2]}}]\n", "did you mean `layer_range`"),
        (HEAD + "- sources: [{model: b}]\n", r"`slices\[0\]`, `sources\[0\]`: `layer_range` is None"),
        (
            HEAD + "- sources: [{model: b, layer_range: [2, 1]}]\n",
            r"is \[2, 1\], but it must be \[first, end\]",
        ),
        (HEAD + "- sources: [{model: b, layer_range: [-1, 1]}]\n", r"`layer_range` is \[-1, 1\]"),
        (HEAD + "- sources: [{model: b, layer_range: [0, 1.5]}]\n", r"`layer_range` is \[0, 1.5\]"),
        (HEAD + "- sources: [{model: b, layer_range: [0, 0]}]\n", "have no layers"),
        (HEAD + f"- sources: [{BASE}, {{model: m, layer_range: [0, 3]}}]\n", "has 2 of `b`, 3 of `m`"),
        (HEAD + f"- sources: [{BASE}, {BASE}]\n", r"`sources\[1\]` is `b` again"),
        (
            HEAD + f"- sources: [{GOOD}]\n",
            "`base_model` `b` is not one of `sources`.*needs its layers; add it",
        ),
        (HEAD + f"- sources: [{BASE}]\n- sources: [{BASE}, {GOOD}]\n", "has 1 sources and the last 2"),
        (HEAD + f"- sources: [{BASE}]\n  parameters: {{lamda: 1}}\n", "`lamda`; did you mean `lambda`"),
        (
            HEAD + f"- sources: [{BASE}, {GOOD.replace('weight', 'lambda')}]\n",
            "`lambda` holds for all models",
        ),
        (HEAD.replace("base_model: b\n", "") + f"- sources: [{GOOD}]\n", "`base_model` is missing"),
        (HEAD.replace("task_arithmetic", "slerp") + f"- sources: [{BASE}]\n", "slerp has 0 models beside"),
    ],
)
def test_what_is_wrong_with_slices_is_said_before_models_are_opened(tmp_path: Path, text: str, message: str):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as raised:
        read_mergekit(path)
    assert str(raised.value).startswith(str(path))


def refused(text: str, folders: Mapping[str, Path], tmp_path: Path) -> str:
    """Message of the error; nothing may have been written."""
    with pytest.raises(EvomergeError) as caught:
        merge_mergekit(written(tmp_path / "a", text, folders), tmp_path / "out")
    assert not isinstance(caught.value, ExportError)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    return str(caught.value)


def test_a_range_beyond_the_models_layers_is_refused(folders: dict[str, Path], tmp_path: Path):
    message = refused(SHORTER.replace("[2, 3]", "[2, 4]"), folders, tmp_path)
    assert "`slices[0]`: `layer_range` of" in message
    assert "ends at 4, but the model has 3 layers" in message


def test_two_sources_in_a_slice_of_passthrough_are_refused(folders: dict[str, Path], tmp_path: Path):
    text = SHORTER.replace("}}]", "}}, {{model: {far}, layer_range: [2, 3]}}]", 1)
    assert "passthrough has 2 models, but it merges 1" in refused(text, folders, tmp_path)


def test_a_model_of_another_width_is_refused(folders: dict[str, Path], tmp_path: Path):
    narrow = tiny_model(
        tmp_path / "narrow",
        hidden=128,
        tied=False,
        config={"num_attention_heads": 2, "num_key_value_heads": 2},
    )
    message = refused(SHORTER.replace("{code}", str(narrow)).replace("[0, 0]", "[0, 1]"), folders, tmp_path)
    assert "`slices[1]`: `" in message
    assert "has shape (" in message
    assert "use models of one layout" in message


def test_layers_with_other_tensors_are_refused(folders: dict[str, Path], tmp_path: Path):
    other = tiny_model(tmp_path / "other", 1, noise_from=folders["base"])
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, other / "model.safetensors")
    text = SLERP_BASE_LAST.replace("{math}", str(other))
    with pytest.raises(
        CompatibilityError, match=r"layer 1 of .*other` and layer 0 of .*`\.self_attn\.q_proj\.bias`"
    ):
        merge_mergekit(written(tmp_path / "a", text, folders), tmp_path / "out")


def test_several_stacks_of_layers_are_refused(folders: dict[str, Path], tmp_path: Path):
    other = tiny_model(tmp_path / "other", 1, noise_from=folders["base"])
    tensors = load_file(other / "model.safetensors")
    tensors["mtp.layers.0.proj.weight"] = torch.zeros(4)
    save_file(tensors, other / "model.safetensors")
    message = refused(SHORTER.replace("{base}", str(other)), folders, tmp_path)
    assert "has `mtp.layers.0.proj.weight`: `slices` are for models with one stack of layers" in message


def test_a_file_of_whole_models_is_evaluated_as_what_it_merges_to(exact_family: SourceSet, tmp_path: Path):
    from evomerge.export.mergekit_recipe import mergekit_recipe
    from evomerge.merge.cast import CastMerge
    from evomerge.merge.plan import MergePlan

    text = (
        "merge_method: dare_linear\nbase_model: {base}\nmodels:\n"
        "- {{model: {math}, parameters: {{weight: [0.2, 0.7]}}}}\n"
        "- {{model: {far}, parameters: {{weight: [{{filter: mlp, value: 0.4}}, {{value: 0.1}}]}}}}\n"
        "parameters: {{density: 0.5}}\n"
    )
    path = written(tmp_path / "a", text, exact_family.folders)
    merged = weights_of(merge_mergekit(path, tmp_path / "out"))
    recipe, sources, layout = mergekit_recipe(path)
    loaded = dict(CastMerge(sources, MergePlan.compile(recipe, layout))(set(layout.tensors)))
    assert set(loaded) == set(merged)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORTER, "a file with `slices` is no single recipe; merge it with `evomerge merge"),
        (
            "merge_method: linear\nmodels:\n- {{model: {math}, "
            "parameters: {{weight: [{{filter: q_proj, value: 1}}, {{value: 0.5}}]}}}}\n",
            r"of layers\[0\]\.attention have different settings.*evomerge merge .* FOLDER` and give FOLDER",
        ),
        (
            "merge_method: linear\nmodels:\n- {{model: {math}, parameters: {{weight: 1}}}}\n"
            '- {{model: "{code}+{lora}", '
            "parameters: {{weight: 1}}}}\n",
            "a file with an adapter of another model is no single recipe",
        ),
    ],
)
def test_a_file_that_is_no_single_recipe_is_to_be_merged_first(
    folders: dict[str, Path], tmp_path: Path, text: str, message: str
):
    from evomerge.export.mergekit_recipe import mergekit_recipe

    with pytest.raises(RecipeError, match=message):
        mergekit_recipe(written(tmp_path / "a", text, folders))
