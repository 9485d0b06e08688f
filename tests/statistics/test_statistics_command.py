"""`evomerge statistics`, its files as part of sources, and `evomerge methods`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.build import Parts
from evomerge.config import load_config
from evomerge.errors import CompatibilityError, ConfigError, RecipeError, SourceError
from evomerge.export.recipe_file import recipe_document, write_yaml
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import MergePlan
from evomerge.model import open_recipe
from evomerge.recipe import Recipe, Setting
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.statistics import measure
from evomerge.statistics.texts import Text, choose, read_texts
from tests.conftest import Command
from tests.tiny import tiny_adapter, tiny_model
from tests.world import World

Q, K = (f"model.layers.0.self_attn.{side}_proj.weight" for side in "qk")
LINES = "the hat is on the heater\n\nin the other one there is tea\nrest\n"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base = tiny_model(folder / "base")
    tiny_model(folder / "full", seed=1, noise_from=base)
    tiny_adapter(folder / "lora", base, seed=2)
    (folder / "texts.txt").write_text(LINES)
    return folder


def facts(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_both_kinds_go_into_one_file_that_says_what_it_is(family: Path, tmp_path: Path, command: Command):
    out = tmp_path / "full.safetensors"
    words = ["--kind", "fisher", "--kind", "gram", "--seed", 3, "--device", "cpu", "--out", out]
    code, printed, _ = command("statistics", family / "full", family / "texts.txt", *words)
    tensors = load_file(out)
    model = load_file(family / "full" / "model.safetensors")
    assert code == 0
    assert "fisher of 20 tensors, gram of 8 tensors, from" in printed
    assert {k.removeprefix("fisher/"): v.shape for k, v in tensors.items() if k.startswith("fisher/")} == {
        name: tensor.shape for name, tensor in model.items()
    }
    metadata = facts(out)
    assert json.loads(metadata["shared"])[K] == Q
    full = SourceSet.open(SourceRef(model=str(family / "full")), {})
    assert metadata["model_sha256"] == full.base.sha256()
    assert (metadata["seed"], metadata["texts"], metadata["estimator"]) == ("3", "3", "sampled")
    assert set(json.loads(metadata["versions"])) == {"evomerge", "torch", "transformers"}


def test_an_adapter_is_measured_as_the_model_that_it_makes(family: Path, tmp_path: Path, command: Command):
    out = tmp_path / "lora.safetensors"
    words = ["--base", family / "base", "--kind", "gram", "--device", "cpu", "--dtype", "float32"]
    assert command("statistics", family / "lora", family / "texts.txt", *words, "--out", out)[0] == 0
    merged = tmp_path / "merged"
    shutil.copytree(family / "base", merged)
    sources = SourceSet.open(
        SourceRef(model=str(family / "base")), {"lora": SourceRef(adapter=str(family / "lora"))}
    )
    tensors = {}
    for name in sources.tensor_names:
        base, delta = sources.base_tensor(name), sources.delta("lora", name)
        tensors[name] = base if delta is None else (base.float() + delta).to(base.dtype)
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    whole = tmp_path / "merged.safetensors"
    command("statistics", merged, family / "texts.txt", *words[2:], "--out", whole)
    one, other = load_file(out), load_file(whole)
    assert {key: torch.equal(one[key], other[key]) for key in other} == dict.fromkeys(one, True)
    assert facts(out)["base_sha256"] == sources.base.sha256()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full", "none.txt"], r"none.txt: no such file"),
        (["full", "empty.txt"], r"empty.txt: there is no text in it"),
        (["full", "bad.jsonl"], r"bad.jsonl:2: the keys are question; there must be `text`, or"),
        (["full", "short.txt"], r"none of the 1 texts has a token to score"),
        (
            ["full", "texts.txt", "--kind", "hessian"],
            r"--kind is hessian; what can be measured is fisher, gram",
        ),
        (
            ["full", "texts.txt", "--estimator", "true"],
            r"--estimator is 'true'; it can be sampled or empirical",
        ),
        (["full", "texts.txt", "--max-length", "1"], r"max_length is 1, but it must be at least 2"),
        (["full", "texts.txt", "--exclude", "("], r"--exclude is '\(', no regular expression"),
        (["full", "texts.txt", "--base", "./base"], r"is a full model; remove --base"),
        (["lora", "texts.txt"], r"is an adapter; give the model that it was trained from with --base"),
        (["nothing", "texts.txt"], r"folder `.*nothing` does not exist"),
        (["broken", "texts.txt"], r"broken` cannot be opened by transformers"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    family: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words, message
):
    import re

    monkeypatch.chdir(family)
    files = {"empty.txt": "\n \n", "bad.jsonl": '{"text": "a"}\n{"question": "b"}\n', "short.txt": "a\n"}
    for name, content in files.items():
        (family / name).write_text(content)
    if words[0] == "broken" and not (family / "broken").exists():
        shutil.copytree(family / "full", family / "broken")
        config = json.loads((family / "broken" / "config.json").read_text())
        (family / "broken" / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    code, _, shown = command("statistics", f"./{words[0]}", *words[1:], "--out", tmp_path / "out.safetensors")
    assert code == 2
    assert re.search(message, shown), shown
    assert not (tmp_path / "out.safetensors").exists()


def test_more_memory_than_is_free_is_refused_before_the_work(
    family: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 100_000)
    words = ["--kind", "gram", "--device", "cpu", "--out", tmp_path / "x"]
    code, _, shown = command("statistics", family / "full", family / "texts.txt", *words)
    assert code == 2
    assert "need 0.00017 GB beside the model, but 0.0001 GB are free" in shown
    assert "(largest: `gram/model.layers.0.mlp.down_proj.weight`" in shown
    assert command("statistics", family / "full", family / "texts.txt", *words, "--exclude", "mlp")[0] == 0


def test_texts_are_read_from_lines_and_from_json(tmp_path: Path):
    rows = ['{"text": "one", "id": 3}', "", '{"prompt": "p", "completion": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.jsonl") == [Text("", "one"), Text("p", "c")]
    assert read_texts(tmp_path / "a.txt") == [Text("", "one"), Text("", "two")]


class Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_of_a_prompt_with_completion_the_completion_is_scored():
    (tokens,) = choose([Text("ab", "cde")], Letters(), max_length=4, max_tokens=9, seed=0)
    assert (len(tokens.ids), tokens.first, tokens.scored) == (4, 2, 2)


def test_texts_are_taken_in_an_order_of_the_seed_until_the_tokens_are_reached():
    texts = [Text("", letter * 3) for letter in "abcdefgh"]
    chosen = [choose(texts, Letters(), max_length=9, max_tokens=10, seed=seed) for seed in (0, 0, 1)]
    assert [len(rows) for rows in chosen] == [4, 4, 4]
    assert chosen[0] == chosen[1] != chosen[2]


def carried(family: Path, file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> SourceRef:
    save_file(tensors, file, metadata or None)
    return SourceRef(model=str(family / "full"), statistics=(str(file),))


def opened(family: Path, ref: SourceRef) -> SourceSet:
    return SourceSet.open(SourceRef(model=str(family / "base")), {"full": ref})


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({Q: (64, 64)}, {}, SourceError, rf"tensor `{Q}` names no kind; name tensors KIND/NAME"),
        (
            {f"fisher/{Q}": (64, 3)},
            {},
            CompatibilityError,
            r"has shape \(64, 3\).*must be .* of shape \(64, 64\)",
        ),
        ({"fisher/x": (3,)}, {}, CompatibilityError, "for a tensor `x`, which the base has not got"),
        ({f"gram/{Q}": (3, 3)}, {}, CompatibilityError, r"must be floating point of shape \(64, 64\)"),
        (
            {f"fisher/{Q}": (64, 64)},
            {"model_sha256": "abc"},
            CompatibilityError,
            "made from a model with SHA-256 abc",
        ),
    ],
)
def test_statistics_that_do_not_fit_their_model_are_refused(
    family: Path, tmp_path: Path, tensors, metadata, error, message
):
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    with pytest.raises(error, match=message):
        opened(family, carried(family, tmp_path / "s.safetensors", made, **metadata))


def test_a_statistics_file_that_is_not_there_is_an_error(family: Path):
    with pytest.raises(SourceError, match=r"model `full`: statistics: file `none` does not exist"):
        opened(family, SourceRef(model=str(family / "full"), statistics=("none",)))


def test_layers_that_share_a_matrix_read_the_same_one(family: Path, tmp_path: Path):
    gram = torch.eye(64) * 3
    ref = carried(family, tmp_path / "s.safetensors", {f"gram/{Q}": gram}, shared=json.dumps({K: Q}))
    found = opened(family, ref).statistics["full"]
    assert torch.equal(found.read("gram", K), gram)
    assert found.read("gram", "model.layers.1.self_attn.k_proj.weight") is None


def test_the_root_mean_square_is_over_all_tensors_of_a_kind(family: Path, tmp_path: Path):
    rows = {f"fisher/{Q}": torch.full((64, 64), 2.0), f"gram/{Q}": torch.full((64, 64), 9.0)}
    rows["fisher/model.norm.weight"] = torch.full((64,), 5.0)
    found = opened(family, carried(family, tmp_path / "s.safetensors", rows)).statistics["full"]
    assert found.rms("fisher") == pytest.approx(((4096 * 4 + 64 * 25) / 4160) ** 0.5)


def test_a_change_of_statistics_changes_hashes_and_stamp(family: Path, tmp_path: Path):
    file = tmp_path / "s.safetensors"
    marks = []
    for value in (1.0, 2.0):
        place = carried(family, file, {f"fisher/{Q}": torch.full((64, 64), value)})
        os.utime(file, (value, value))  # the two files may be written within one tick of the clock
        sources = opened(family, place)
        marks.append((sources.hashes(), sources.stamp()))
    assert marks[0][1] != marks[1][1]
    assert {name for name in marks[0][0] if marks[0][0][name] != marks[1][0][name]} == {"full statistics"}


def test_a_recipe_carries_its_statistics_and_notices_others(family: Path, tmp_path: Path):
    file, tensors = tmp_path / "s.safetensors", {f"fisher/{Q}": torch.ones(64, 64)}
    sources = opened(family, carried(family, file, tensors))
    cells = dict.fromkeys(sources.layout().by_cell, Setting("fisher", {}, {"full": {"weight": 1.0}}))
    write_yaml(tmp_path / "r.yaml", recipe_document(Recipe("base", ("full",), cells), sources))
    assert open_recipe(tmp_path / "r.yaml")[1].statistics["full"].kinds == ("fisher",)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    with pytest.raises(SourceError, match="source `full statistics` has SHA-256"):
        open_recipe(tmp_path / "r.yaml")


def fisher_plan(sources: SourceSet) -> MergePlan:
    setting = Setting("fisher", {}, {name: {"weight": 1.0} for name in sources.models})
    layout = sources.layout()
    return MergePlan.compile(Recipe("base", sources.models, dict.fromkeys(layout.by_cell, setting)), layout)


def test_a_merge_whose_model_lacks_the_statistics_does_not_begin(family: Path):
    sources = opened(family, SourceRef(model=str(family / "full")))
    with pytest.raises(
        RecipeError, match=r"fisher needs the `fisher` statistics.*`full` has none; make them"
    ):
        next(Merger(sources).materialize(fisher_plan(sources)))


def test_the_merger_hands_statistics_to_the_method(family: Path, tmp_path: Path):
    """Three times the information at equal weights: three quarters of the way."""
    refs = {}
    for name, value in (("one", 3.0), ("two", 1.0)):
        save_file({f"fisher/{Q}": torch.full((64, 64), value)}, tmp_path / name)
        folder = family / ("full" if name == "one" else "base")
        refs[name] = SourceRef(model=str(folder), statistics=(str(tmp_path / name),))
    sources = SourceSet.open(SourceRef(model=str(family / "base")), refs)
    merged = dict(Merger(sources, cache_bytes=1 << 24).materialize(fisher_plan(sources)))
    delta = sources.delta("one", Q)
    assert delta is not None
    expected = (sources.base_tensor(Q).float() + 0.75 * delta).bfloat16()
    torch.testing.assert_close(merged[Q], expected, rtol=0.01, atol=0)
    half = (sources.base_tensor(K).float() + 0.5 * sources.delta("one", K)).bfloat16()
    torch.testing.assert_close(merged[K], half, rtol=0.01, atol=0)


def test_a_run_that_searches_fisher_says_which_model_lacks_the_file(world: World):
    space = {"methods": ["fisher"], "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    world.run["search"]["stages"] = [{"space": space}]
    save_file({f"fisher/{Q}": torch.ones(64, 64)}, world.folder / "one.safetensors")
    world.run["models"]["one"] = {"model": "./one", "statistics": "one.safetensors"}
    with pytest.raises(ConfigError, match=r"`search.stages\[0\].space`: fisher needs.*model `two` has none"):
        Parts.open(load_config(world.write()))


def test_statistics_of_the_base_are_refused(world: World):
    world.run["base_model"] = {"model": "./base", "statistics": ["x.safetensors"]}
    with pytest.raises(SourceError, match="base `base` has `statistics`"):
        Parts.open(load_config(world.write()))


def test_the_table_of_methods_fits_100_columns(command: Command):
    code, printed, _ = command("methods")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 100
    assert all(name in printed for name in METHODS)


def test_methods_as_json_have_every_parameter(command: Command):
    rows = json.loads(command("methods", "--json")[1])
    assert {row["name"]: {*row["shared"], *row["per_model"]} for row in rows} == {
        name: {*method.spec.shared, *method.spec.per_model} for name, method in METHODS.items()
    }
    (fisher,) = json.loads(command("methods", "fisher", "--json")[1])
    assert (fisher["needs"], fisher["mergekit"], fisher["shared"]["floor"]["default"]) == (
        "fisher",
        None,
        1e-6,
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_formula(name: str, command: Command):
    code, printed, _ = command("methods", name)
    assert code == 0
    assert printed.startswith(f"{name}\n")
    assert METHODS[name].spec.source in printed
    assert (METHODS[name].kernel.__doc__ or "?").splitlines()[0] in printed


def test_an_unknown_method_is_answered_with_the_nearest(command: Command):
    code, _, shown = command("methods", "fischer")
    assert code == 2
    assert "`fischer` is not a merge method; did you mean `fisher`?" in shown


def test_a_run_file_takes_one_statistics_file_or_several(world: World):
    world.run["models"] = {
        "one": {"model": "./one", "statistics": "a"},
        "two": {"model": "./two", "statistics": ["a", "b"]},
    }
    refs = load_config(world.write()).models()
    assert yaml.safe_load(world.run_file.read_text())["models"]["one"]["statistics"] == "a"
    assert [tuple(Path(file).name for file in ref.statistics) for ref in refs.values()] == [
        ("a",),
        ("a", "b"),
    ]
    assert all(Path(file).is_absolute() for ref in refs.values() for file in ref.statistics)
