"""References: what is a folder, what is a hub id, and what is said when neither leads anywhere."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from evomerge.errors import SourceError
from evomerge.sources.reference import SourceRef, commit_of, looks_like_path, resolve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Stands for the hub: records the calls, raises `.error` or answers with `.folder`."""

    class Hub:
        calls: list[tuple[str, str | None]]
        error: Exception | None = None
        folder = "/cache/snapshots/0123abc"

        def __init__(self):
            self.calls = []

        def __call__(self, repo: str, *, revision: str | None, **_: object) -> str:
            self.calls.append((repo, revision))
            if self.error is not None:
                raise self.error
            return self.folder

    result = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", result)
    return result


def test_a_source_is_a_model_or_an_adapter_and_not_both():
    with pytest.raises(SourceError, match="neither of `model` and `adapter`"):
        SourceRef()
    with pytest.raises(SourceError, match="both"):
        SourceRef(model="a", adapter="b")


def test_a_folder_resolves_to_itself(tmp_path: Path, hub):
    assert resolve(SourceRef(model=str(tmp_path)), "model `a`") == tmp_path
    assert hub.calls == []


def test_home_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub):
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    for text in ("~/models", "$WEIGHTS/models", "${WEIGHTS}/models"):
        assert resolve(SourceRef(model=text), "model `a`") == tmp_path / "models"
    assert hub.calls == []


@pytest.mark.parametrize(
    "text", ["./missing", "../missing", "/missing/model", "~/missing", "$UNSET_FOLDER/model"]
)
def test_a_text_that_looks_like_a_path_is_never_sent_to_the_hub(text: str, hub):
    with pytest.raises(SourceError, match=r"model `math`: folder `.*` does not exist; correct `adapter`"):
        resolve(SourceRef(adapter=text), "model `math`")
    assert hub.calls == []


def test_a_relative_folder_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert looks_like_path("org/name")
    assert not looks_like_path("org/other")


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match="is a file; give `model` the folder"):
        resolve(SourceRef(model=str(tmp_path / "model.safetensors")), "model `a`")


def test_a_folder_has_no_revision(tmp_path: Path):
    with pytest.raises(SourceError, match="`revision` is `main`, but"):
        resolve(SourceRef(model=str(tmp_path), revision="main"), "model `a`")


def test_a_hub_id_is_downloaded_at_its_revision(hub):
    folder = resolve(SourceRef(model="org/name", revision="v2"), "model `a`")
    assert hub.calls == [("org/name", "v2")]
    assert folder == Path(hub.folder)
    assert commit_of(folder) == "0123abc"


def test_a_plain_folder_has_no_commit(tmp_path: Path):
    assert commit_of(tmp_path) is None


def test_an_unreachable_hub_is_said_with_the_missing_folder(hub):
    hub.error = errors.LocalEntryNotFoundError("not in the cache")
    with pytest.raises(
        SourceError, match=r"folder `org/name` does not exist, and .* the hub cannot be reached"
    ):
        resolve(SourceRef(model="org/name"), "model `a`")


def test_an_id_that_the_hub_refuses_is_said(hub):
    hub.error = errors.HFValidationError("two slashes")
    with pytest.raises(SourceError, match="`a/b/c` is neither a folder here nor known to the hub"):
        resolve(SourceRef(model="a/b/c"), "model `a`")


def test_offline_without_cache_is_a_source_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="the hub cannot be reached"):
        resolve(SourceRef(model="evomerge-tests/missing"), "model `a`")
