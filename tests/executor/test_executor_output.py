"""Output directories, atomic files, weights on disk."""

from __future__ import annotations

import fcntl
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from executor.errors import BadWeights, DirectoryInUse
from executor.files import publish_folder, write_atomically
from executor.output import OutputDirectory
from executor.weights import check_weights

SETTINGS = {"seed": 0}


def opened(
    path: Path, digest: str = "a", settings: dict[str, int] = SETTINGS, restart: bool = False
) -> tuple:
    directory = OutputDirectory(path)
    return directory, directory.open(digest, settings, restart)


def test_new_unfinished_finished(tmp_path: Path) -> None:
    directory, status = opened(tmp_path / "run")
    assert status == "new"
    directory.close()
    directory, status = opened(tmp_path / "run")
    assert status == "unfinished"
    write_atomically(directory.report, "{}")
    directory.finish()
    directory.close()
    directory, status = opened(tmp_path / "run")
    assert status == "finished"
    directory.close()
    directory, status = opened(tmp_path / "run", restart=True)
    assert status == "new" and not directory.report.exists()
    directory.close()


def test_second_process_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first, _ = opened(tmp_path)
    with pytest.raises(DirectoryInUse, match="another run is working"):
        opened(tmp_path)
    first.close()
    opened(tmp_path)[0].close()


def test_other_plan_other_settings_other_content(tmp_path: Path) -> None:
    opened(tmp_path / "run")[0].close()
    with pytest.raises(DirectoryInUse, match="another plan"):
        opened(tmp_path / "run", digest="b")
    with pytest.raises(DirectoryInUse, match="seed was 0, now 1"):
        opened(tmp_path / "run", settings={"seed": 1})
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    with pytest.raises(DirectoryInUse, match="something else"):
        opened(tmp_path / "foreign")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(DirectoryInUse, match="cannot read"):
        opened(tmp_path / "run")


def test_forget_leaves_nothing_but_keeps_results(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path / "empty")
    directory.forget_if_empty()
    assert not (tmp_path / "empty").exists()
    directory, _ = opened(tmp_path / "kept")
    (tmp_path / "kept" / "checkpoint-3").mkdir()
    directory.forget_if_empty()
    assert (tmp_path / "kept" / "run.json").exists()
    directory.close()


def test_checkpoints_in_order_and_only_whole_ones(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path)
    for name in ("checkpoint-10", "checkpoint-9", ".partial/step-11", "checkpoint-x"):
        (tmp_path / name).mkdir(parents=True)
    assert [p.name for p in directory.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    directory.close()
    again, _ = opened(tmp_path)
    assert not again.partial.exists()
    again.close()


def test_publish_replaces_whole_folders(tmp_path: Path) -> None:
    for content in ("1", "2"):
        staging = tmp_path / "staging"
        staging.mkdir()
        (staging / "f").write_text(content)
        publish_folder(staging, tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "2" and not staging.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryInUse, match="cannot write"):
        opened(tmp_path / "file" / "run")


def safetensors(path: Path, sizes: dict[str, int], cut: int = 0, grow: int = 0) -> None:
    header, start = {}, 0
    for name, n in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [n], "data_offsets": [start, start + 2 * n]}
        start += 2 * n
    raw = json.dumps(header).encode()
    data = struct.pack("<Q", len(raw)) + raw + bytes(start + grow)
    path.write_bytes(data[: len(data) - cut])


def test_whole_weights(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": 4, "b": 6})
    assert check_weights(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("cut", "grow", "says"), [(4, 0, "truncated: b"), (18, 0, "truncated: a"), (0, 3, "3 bytes more")]
)
def test_truncated_and_grown(tmp_path: Path, cut: int, grow: int, says: str) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": 4, "b": 6}, cut, grow)
    with pytest.raises(BadWeights) as caught:
        check_weights(tmp_path)
    assert says in str(caught.value) and "model.safetensors" in str(caught.value)


def test_shards(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors(tmp_path / "m-1.safetensors", {"a": 4})
    with pytest.raises(BadWeights, match=r"m-2\.safetensors is missing"):
        check_weights(tmp_path)
    safetensors(tmp_path / "m-2.safetensors", {"c": 4})
    with pytest.raises(BadWeights, match="lacks the tensor b"):
        check_weights(tmp_path)
    index["weight_map"]["b"] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadWeights, match="outside its folder"):
        check_weights(tmp_path)


def test_foreign_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="no weights"):
        check_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadWeights, match=r"no safetensors weights, only pytorch_model\.bin"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02pickle...")
    with pytest.raises(BadWeights, match="is no safetensors file"):
        check_weights(tmp_path)


def test_a_lock_file_removed_under_the_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its last holder may have tidied it away."""
    lock, real = fcntl.flock, tmp_path / "o" / ".lock"
    calls = []

    def late(file: Any, how: int) -> None:
        if not calls:
            real.unlink()
        calls.append(how)
        lock(file, how)

    monkeypatch.setattr("executor.output.fcntl.flock", late)
    first = OutputDirectory(tmp_path / "o")
    first.open("digest", {}, restart=False)
    assert len(calls) == 2 and real.exists()
    with pytest.raises(DirectoryInUse):
        OutputDirectory(tmp_path / "o").open("digest", {}, restart=False)
    first.close()
