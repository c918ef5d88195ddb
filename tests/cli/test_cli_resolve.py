"""MODEL on the command line: path, catalogue id or Hub name, and which weights the user meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.errors import BadConfig, FitwrightError, UnknownModel
from planner.resolve import resolve
from profiles.catalogue import load_model


@pytest.fixture
def config() -> dict[str, object]:
    return dict(load_model("qwen2.5-7b").config)


@pytest.fixture
def folder(tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `mine` with a config.json, seen from its parent."""
    made = tmp_path / "mine"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize("name", ["./mine", "mine/", "mine/config.json", "./mine/config.json"])
def test_a_path_is_read_and_recorded(folder: Path, name: str) -> None:
    found = resolve(name)
    assert found.profile.parameters == load_model("qwen2.5-7b").parameters
    assert found.path == str(folder) and found.repo_id is None


def test_a_file_of_another_name_works(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")
    assert resolve("mine/other.json").path == str(folder)


def test_a_folder_without_separator_is_no_path_but_the_hint_says_how(folder: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve("mine")
    assert "./mine" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("QWEN2.5-7B", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_aliases_share_facts_and_keep_their_weights(name: str, repo_id: str) -> None:
    found = resolve(name, offline=True)
    assert found.profile.id == "qwen2.5-7b"
    assert found.repo_id == repo_id


@pytest.mark.parametrize(
    "name", ["", " ", "qwen9-7b", "\u202e", "x" * 5000, "a/b/c", "/nope/config", "~/m", "a\0b"]
)
def test_an_unknown_model_is_one_error(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve(name)
    assert len(str(caught.value)) < 300 and "\u202e" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../etc", "./nope", "config.json", ".", "nope/config.json", "./" + "x" * 5000]
)
def test_a_missing_config_is_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfig):
        resolve(name)


def test_a_hub_name_offline_is_one_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(FitwrightError, match="offline") as caught:
        resolve("someone/some-model", offline=True)
    assert caught.value.hint


def test_a_hub_name_is_read_from_the_local_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, object]
) -> None:
    repository = tmp_path / "hub" / "models--someone--some-model"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = resolve("someone/some-model")
    assert (found.repo_id, found.revision) == ("someone/some-model", "abc123")
    assert found.profile.parameters == load_model("qwen2.5-7b").parameters
