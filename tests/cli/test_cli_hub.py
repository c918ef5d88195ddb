"""The Hub client: which calls are made, and what each failure says. The Hub itself is never asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from planner import hub
from planner.errors import FitwrightError, UnknownModel


def refuse(error: type[Exception]) -> object:
    """A function that raises `error`, made without the response its constructor wants."""

    def call(*_: object, **__: object) -> None:
        raised = error.__new__(error)
        Exception.__init__(raised, "no")
        raise raised

    return call


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)


def test_config_and_headers_are_read_at_one_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    config = tmp_path / "config.json"
    config.write_text(json.dumps({}))

    class Api:
        def model_info(self, repo_id: str, **options: object) -> SimpleNamespace:
            asked.append((repo_id, options["expand"]))
            return SimpleNamespace(sha="c0ffee", safetensors=SimpleNamespace(total=123))

    def download(repo_id: str, filename: str, *, revision: str, **_: object) -> str:
        asked.append((repo_id, filename, revision))
        return str(config)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub.fetch("o/n") == hub.HubModel("o/n", "c0ffee", config, 123)
    assert asked == [("o/n", ["sha", "safetensors"]), ("o/n", "config.json", "c0ffee")]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (errors.RepositoryNotFoundError, UnknownModel, "neither in the catalogue nor on the Hub"),
        (errors.GatedRepoError, FitwrightError, "gated"),
        (errors.EntryNotFoundError, FitwrightError, "no config.json"),
        (ConnectionError, FitwrightError, "did not answer"),
        (errors.HfHubHTTPError, FitwrightError, "did not answer"),
    ],
)
def test_each_failure_is_one_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], kind: type[FitwrightError], words: str
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse(error))
    with pytest.raises(kind, match=words) as caught:
        hub.fetch("o/n")
    assert caught.value.hint


def test_no_network_is_told_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    monkeypatch.setenv("HF_ENDPOINT", "https://fitwright.invalid")
    start = time.monotonic()
    with pytest.raises(UnknownModel, match="cannot be reached"):
        hub.fetch("o/n")
    assert time.monotonic() - start < 2


def test_a_listening_proxy_counts_as_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub._reachable("https://fitwright.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:notaport")
    assert not hub._reachable("https://fitwright.invalid")
