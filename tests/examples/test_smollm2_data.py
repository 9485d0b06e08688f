"""The data of the SmolLM2 example: disjoint, reproducible, and as committed."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
ITEMS = ROOT / "fitness" / "spanish_math"
TASKS = ("math", "spanish", "extract", "spanish_math")
EXPERTS = ("math", "spanish", "extract")
SIZES = {"calibration": 32, "selection": 128, "held_out": 256}
# More examples than any expert saw: 400 steps of 16.
TRAINING_COUNT = 6400


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data = _load("data")


@cache
def committed(task: str) -> list[dict[str, str]]:
    lines = (ITEMS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def training_questions() -> frozenset[str]:
    return frozenset(
        example.question for expert in EXPERTS for example in data.training_examples(expert, TRAINING_COUNT)
    )


@pytest.mark.parametrize("task", TASKS)
def test_committed_items_are_what_the_generator_makes(task):
    assert (ITEMS / f"{task}.jsonl").read_bytes() == data.jsonl(task).encode()


@pytest.mark.parametrize("task", TASKS)
def test_every_split_has_its_size(task):
    splits = [item["split"] for item in committed(task)]
    assert {split: splits.count(split) for split in SIZES} == SIZES
    assert len(splits) == sum(SIZES.values())


def test_no_question_occurs_twice_in_any_split_of_any_task():
    questions = [item["question"] for task in TASKS for item in committed(task)]
    assert len(set(questions)) == len(questions)


def test_no_item_is_a_training_example():
    questions = {item["question"] for task in TASKS for item in committed(task)}
    assert not questions & training_questions()


def test_people_and_cities_of_the_items_are_in_no_training_example():
    words = {word.strip(".,?¿") for question in training_questions() for word in question.split()}
    assert not words & set(data.ITEM_POOL.people + data.ITEM_POOL.cities)


def test_every_pair_of_numbers_belongs_to_one_owner_and_every_owner_has_pairs():
    owners = [data.owner_of_pair(a, b) for a in range(2, 100) for b in range(2, 40)]
    assert set(owners) == {"training", *SIZES}
    assert sum(data.PAIR_SHARES.values()) == 100


@pytest.mark.parametrize("task", TASKS)
def test_ids_name_task_split_and_place(task):
    ids = [item["id"] for item in committed(task)]
    assert ids == [f"{task}-{split}-{i:03d}" for split, size in SIZES.items() for i in range(size)]


@pytest.mark.parametrize("task", ["math", "spanish_math"])
def test_answers_of_word_problems_are_small_numbers(task):
    assert all(1 <= int(item["answer"]) <= 29 for item in committed(task))


def test_answers_of_extract_are_objects_with_three_keys():
    assert {len(json.loads(item["answer"])) for item in committed("extract")} == {3}


def test_nobody_can_train_on_the_composite():
    with pytest.raises(ValueError, match="expert is 'spanish_math', must be one of math, spanish"):
        data.training_examples("spanish_math", 1)


def test_a_longer_training_list_starts_with_the_shorter_one():
    assert data.training_examples("math", 30)[:10] == data.training_examples("math", 10)


@pytest.mark.parametrize(
    ("number", "gender", "word"),
    [
        (1, "o", "un"),
        (16, None, "dieciséis"),
        (21, None, "veintiuno"),
        (21, "o", "veintiún"),
        (21, "a", "veintiuna"),
        (40, "a", "cuarenta"),
        (51, "o", "cincuenta y un"),
        (71, "a", "setenta y una"),
        (99, "o", "noventa y nueve"),
    ],
)
def test_spanish_cardinals_agree_with_their_noun(number, gender, word):
    assert data.number_word(number, gender) == word


@pytest.mark.parametrize("expert", EXPERTS)
def test_adapters_are_bfloat16_and_below_ten_megabytes(expert):
    path = EXAMPLE / "adapters" / expert / "adapter_model.safetensors"
    assert path.stat().st_size < 10_000_000
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))  # safetensors: u64, then a JSON header
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}


@pytest.mark.parametrize("expert", EXPERTS)
def test_adapters_name_their_base_and_nothing_else_lies_beside_them(expert):
    folder = EXAMPLE / "adapters" / expert
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
