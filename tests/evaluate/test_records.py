"""Item scores at rest: complete or absent, equal bytes for equal scores, damage named."""

from __future__ import annotations

import gzip
import os

import pytest

from evomerge.errors import StorageError
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.score import ItemScore

KEY = "calibration/000012-ab12cd34"
SCORES = [
    ItemScore("math", "a", 1.0, "42\n{\u2028é}", 3),
    ItemScore("math", "b", -0.1 - 0.2, "", 0),
]


@pytest.fixture
def store(tmp_path):
    return ItemStore(tmp_path / "items")


def test_what_is_written_is_read(store):
    store.write(KEY, SCORES)
    assert store.read(KEY) == SCORES
    assert KEY in store
    assert "calibration/other" not in store


def test_no_scores_are_a_record_too(store):
    store.write(KEY, [])
    assert store.read(KEY) == []


def test_equal_scores_are_equal_bytes(store):
    first, second = store.write(KEY, SCORES), store.write("selection/x", SCORES)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # RFC 1952: the modification time


def test_a_line_is_one_json_object_with_the_named_fields(store):
    text = gzip.decompress(store.write(KEY, SCORES[:1]).read_bytes()).decode()
    assert (
        text == '{"task": "math", "item": "a", "value": 1.0, "completion": "42\\n{\u2028é}", "tokens": 3}\n'
    )


def test_a_write_that_fails_leaves_the_old_record(store, monkeypatch):
    store.write(KEY, SCORES)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"000012-ab12cd34\.jsonl\.gz: cannot be written \(No space left"):
        store.write(KEY, [])
    assert store.read(KEY) == SCORES
    assert len(list(store.path(KEY).parent.iterdir())) == 1


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "damage",
    [
        rewrite(lambda raw: raw[:-3]),
        rewrite(lambda raw: raw[:20]),
        rewrite(lambda raw: raw[:40] + bytes([raw[40] ^ 255]) + raw[41:]),
        rewrite(lambda raw: b"plain text"),
        rewrite(lambda raw: gzip.compress(b'{"task": "math"}\n')),
        rewrite(lambda raw: gzip.compress(b"{]\n")),
        rewrite(lambda raw: gzip.compress(b"\xff\xfe\n")),
        rewrite(lambda raw: gzip.compress(b"3\n")),
    ],
)
def test_a_damaged_file_is_named(store, damage):
    damage(store.write(KEY, SCORES))
    with pytest.raises(StorageError, match=r"000012-ab12cd34\.jsonl\.gz: damaged"):
        store.read(KEY)


def test_an_absent_record_is_named(store):
    with pytest.raises(StorageError, match=r"000012-ab12cd34\.jsonl\.gz: no such file"):
        store.read(KEY)


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "", "a/../../b", ".hidden", "a b", "a/"])
def test_a_key_cannot_leave_the_folder(store, key):
    with pytest.raises(StorageError, match="key"):
        store.path(key)
