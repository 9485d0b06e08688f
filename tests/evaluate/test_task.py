"""Suites: every mistake found at loading, held-out items sealed, a digest of what influences scores."""

from __future__ import annotations

import json
import re

import pytest

from evomerge.errors import ConfigError, FitnessError, HeldOutError
from evomerge.evaluate.task import Suite


def test_items_come_rendered_and_in_the_order_of_the_file(write_suite):
    suite = Suite.load(write_suite())
    items = suite.items("math", "calibration")
    assert [item.id for item in items] == ["math-calibration-0", "math-calibration-1", "math-calibration-2"]
    assert items[0].prompt == "math calibration 0?\nAnswer:"
    assert (items[1].task, items[1].split, items[1].answer) == ("math", "calibration", "1")
    assert items[1].fields["question"] == "math calibration 1?"


def test_settings_reach_the_task(write_suite):
    path = write_suite(chat=True, system="Be brief.", max_tokens=8, stop=["\n"], weight=2.5)
    task = Suite.load(path).tasks["math"]
    assert (task.chat, task.system, task.max_tokens, task.stop, task.weight) == (
        True,
        "Be brief.",
        8,
        ("\n",),
        2.5,
    )


def test_limits_keep_the_first_items_of_each_task(write_suite):
    suite = Suite.load(write_suite(), {"calibration": 2, "held_out": 1})
    assert suite.sizes()["words"] == {"calibration": 2, "selection": 3, "held_out": 1}
    assert [item.id for item in suite.items("words", "calibration")] == [
        "words-calibration-0",
        "words-calibration-1",
    ]


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_data_may_be_several_files(write_suite, rows, tmp_path, form):
    data = rows("math")
    for split in ("calibration", "selection", "held_out"):
        lines = [json.dumps(row) for row in data if row["split"] == split]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    names = {split: f"{split}.jsonl" for split in ("calibration", "selection", "held_out")}
    together = Suite.load(write_suite({"math": data}))
    apart = Suite.load(write_suite({"math": data}, data=names if form == "mapping" else list(names.values())))
    assert apart.digest == together.digest


def test_line_separators_inside_texts_and_blank_lines_do_no_harm(write_suite, rows):
    data = rows("math")
    lines = [json.dumps({**data[0], "question": "a\u2028b\x85c"}, ensure_ascii=False), "", *data[1:]]
    suite = Suite.load(write_suite({"math": lines}))
    assert suite.items("math", "calibration")[0].prompt == "a\u2028b\x85c\nAnswer:"
    assert suite.sizes()["math"]["calibration"] == 3


# --- sealing (promise 3)


def test_held_out_items_are_sealed(write_suite):
    suite = Suite.load(write_suite())
    with pytest.raises(HeldOutError, match=r"held-out items of task `math` .* sealed"):
        suite.items("math", "held_out")


def test_held_out_items_can_be_read_only_inside_unsealed(write_suite):
    suite = Suite.load(write_suite())
    with suite.unsealed():
        with suite.unsealed():
            pass
        assert len(suite.items("math", "held_out")) == 3
    with pytest.raises(HeldOutError):
        suite.items("math", "held_out")


def test_an_error_inside_unsealed_seals_again(write_suite):
    suite = Suite.load(write_suite())
    with pytest.raises(KeyError), suite.unsealed():
        raise KeyError
    with pytest.raises(HeldOutError):
        suite.items("math", "held_out")


def test_the_same_prompt_in_two_splits_is_refused_with_both_ids(write_suite, rows):
    data = rows("math")
    data[-1]["question"] = data[0]["question"]
    with pytest.raises(
        FitnessError, match=r"math\.jsonl:9: item `math-held_out-2` .*`math-calibration-0`.*jsonl:1;"
    ):
        Suite.load(write_suite({"math": data}))


def test_the_same_prompt_in_two_splits_of_two_tasks_is_refused(write_suite, rows):
    data = {"math": rows("math"), "words": rows("words")}
    data["words"][8]["question"] = data["math"][0]["question"]
    with pytest.raises(
        FitnessError, match=r"`words-held_out-2` \(task `words`.*`math-calibration-0` \(task `math`"
    ):
        Suite.load(write_suite(data))


def test_a_leak_beyond_the_limits_is_still_found(write_suite, rows):
    data = rows("math")
    data[-1]["question"] = data[2]["question"]
    with pytest.raises(FitnessError, match="same prompt"):
        Suite.load(write_suite({"math": data}), {"calibration": 1, "held_out": 1})


def test_texts_for_nll_may_share_an_empty_prompt(write_suite, rows):
    data = [{**row, "answer": f"text {row['id']}"} for row in rows("text")]
    suite = Suite.load(write_suite({"text": data}, prompt="", scorer="nll"))
    assert suite.sizes()["text"]["selection"] == 3
    data[-1]["answer"] = data[0]["answer"]
    with pytest.raises(FitnessError, match="same prompt"):
        Suite.load(write_suite({"text": data}, prompt="", scorer="nll"))


# --- mistakes


def change(line, **changes):
    """Rows with some keys of one line replaced; `...` removes a key."""

    def edit(rows):
        row = {key: value for key, value in {**rows[line - 1], **changes}.items() if value is not ...}
        return [*rows[: line - 1], row, *rows[line:]]

    return edit


def insert(text):
    """Rows whose fourth line is `text`."""
    return lambda rows: [*rows[:3], text, *rows[4:]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(4, id="math-calibration-0"),
         r"math\.jsonl:4: id `math-calibration-0` was given .*jsonl:1 already"),
        (change(4, id=...), r"math\.jsonl:4: the item has no `id`"),
        (change(4, id=[1]), r"math\.jsonl:4: `id` is \[1\], but it must be text or a whole number"),
        (change(4, answer=...), r"math\.jsonl:4: the item has no `answer`"),
        (change(4, answer=None), r"math\.jsonl:4: the item has no `answer`"),
        (change(4, answer="none"),
         r"math\.jsonl:4: item `math-selection-0` of task `math`: `answer` is 'none'"),
        (change(4, split=...), r"math\.jsonl:4: the item has no `split`"),
        (change(4, split="heldout"), r"math\.jsonl:4: unknown split 'heldout'; did you mean `held_out`\?"),
        (change(4, question=...), r"math\.jsonl:4: the prompt template asks for .* 'question' is undefined"),
        (change(4, choices=["a"]),
         r"math\.jsonl:4: `choices` is \['a'\], but it must be a list of two or more"),
        (change(4, choices=["a", "a"]), r"math\.jsonl:4: `choices` is .* different texts"),
        (insert('{"id": 1,'), r"math\.jsonl:4: not JSON \(.*\); each line must hold one object"),
        (insert('{"id": NaN}'), r"math\.jsonl:4: not JSON \(NaN is no JSON number\)"),
        (insert("[1]"), r"math\.jsonl:4: the line must hold one JSON object"),
        (lambda rows: rows[:6],
         r"suite\.yaml: task `math` has no item in split `held_out`; add items to math\.jsonl"),
        (lambda rows: [], r"suite\.yaml: task `math` has no item in split `calibration`"),
    ],
)  # fmt: skip
def test_a_wrong_item_is_refused_with_its_line(write_suite, rows, edit, message):
    with pytest.raises(FitnessError, match=message):
        Suite.load(write_suite({"math": edit(rows("math"))}))


def test_a_choice_task_without_choices_is_refused(write_suite):
    with pytest.raises(FitnessError, match=r"math\.jsonl:1: item .* the choice scorer needs `choices`"):
        Suite.load(write_suite(scorer="choice"))


@pytest.mark.parametrize(
    ("top", "options", "message"),
    [
        ({"agregate": "min"}, {}, "unknown key `agregate`; did you mean `aggregate`?"),
        ({"aggregate": "max"}, {}, "`aggregate` is 'max'; allowed: mean, min, normalized"),
        ({"tasks": {}}, {}, "`tasks` is {}, but it should have at least 1 item"),
        ({}, {"scorrer": "x"}, "unknown key `tasks.math.scorrer`; did you mean `scorer`?"),
        ({}, {"scorer": "exakt"}, "`tasks.math.scorer`: unknown scorer `exakt`; did you mean `exact`?"),
        ({}, {"max_tokens": 0}, "`tasks.math.max_tokens` is 0, but it should be greater than or equal to 1"),
        ({}, {"weight": 0}, "`tasks.math.weight` is 0, but it should be greater than 0"),
        ({}, {"stop": [""]}, "`tasks.math.stop[0]` is '', but it should have at least 1 character"),
        ({}, {"data": {"heldout": "x"}}, "unknown key `tasks.math.data.heldout`; did you mean `held_out`?"),
        ({}, {"prompt": "{{ question"}, "`tasks.math.prompt`: line 1 of the prompt is not jinja2"),
        ({}, {"system": "x"}, "`tasks.math.system` is set, but `chat` is false; set `chat: true`"),
    ],
)  # fmt: skip
def test_a_wrong_suite_file_is_refused_with_its_key(write_suite, top, options, message):
    path = write_suite(top=top, **options)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        Suite.load(path)


def test_a_missing_data_file_is_named(write_suite):
    with pytest.raises(FitnessError, match=r"none\.jsonl: cannot be read .*; correct `data` of task `math`"):
        Suite.load(write_suite(data="none.jsonl"))


def test_an_item_in_the_file_of_another_split_is_refused(write_suite, rows):
    with pytest.raises(
        FitnessError, match=r"says split `selection`, but its file is listed as `calibration`"
    ):
        Suite.load(write_suite({"math": rows("math")}, data={"calibration": "math.jsonl"}))


@pytest.mark.parametrize("limits", [{"calibration": 0}, {"calibratoin": 3}])
def test_wrong_limits_are_refused(write_suite, limits):
    with pytest.raises(ConfigError, match=r"at least 1|did you mean `calibration`"):
        Suite.load(write_suite(), limits)


def test_an_unknown_task_or_split_is_refused(write_suite):
    suite = Suite.load(write_suite())
    with pytest.raises(FitnessError, match=r"no task `maths`; did you mean `math`\?"):
        suite.items("maths", "calibration")
    with pytest.raises(FitnessError, match=r"unknown split 'test'"):
        suite.items("math", "test")


def test_a_template_that_raises_is_named_with_its_line(write_suite):
    with pytest.raises(FitnessError, match=r"math\.jsonl:1: rendering the prompt failed: TypeError"):
        Suite.load(write_suite(prompt="{{ question + 1 }}"))


def test_a_template_cannot_reach_into_python(write_suite):
    with pytest.raises(FitnessError, match=r"rendering the prompt failed|unsafe"):
        Suite.load(write_suite(prompt="{{ question.__class__.__mro__[1].__subclasses__() }}"))


# --- digest


def test_the_digest_ignores_what_scores_do_not_depend_on(write_suite):
    first = Suite.load(write_suite()).digest
    assert Suite.load(write_suite(top={"description": "other words"})).digest == first
    assert Suite.load(write_suite(), {"calibration": 100}).digest == first


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 2.0},
        {"max_tokens": 3},
        {"stop": ["\n"]},
        {"chat": True},
        {"prompt": "{{ question }}\nA:"},
        {"scorer": "exact"},
        {"scorer": {"type": "numeric", "which": "last"}},
        {"top": {"aggregate": "min"}},
        {"edit": change(5, answer="77")},
        {"edit": change(9, id="x")},
        {"edit": lambda rows: rows[::-1]},
        {"limits": {"held_out": 2}},
    ],
)
def test_the_digest_changes_with_whatever_influences_scores(write_suite, rows, change):
    options = dict(change)
    limits, edit = options.pop("limits", None), options.pop("edit", list)
    plain = Suite.load(write_suite({"math": rows("math")})).digest
    assert Suite.load(write_suite({"math": edit(rows("math"))}, **options), limits).digest != plain
