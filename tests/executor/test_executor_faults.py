"""What goes wrong on real machines: one clear line, the right exit code, nothing half-written or lost."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import fails, make_plan, strategy

from executor.cli import main
from planner.types import Workload

pytestmark = pytest.mark.executor
TRAIN = Workload(task="train", seq_len=64, batch_size=2, method="lora")
INFER = Workload(task="infer", prompt_tokens=32, new_tokens=4)


# --------------------------------------------------------------------------- weights and model folders


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    fields = json.loads(raw[8 : 8 + length])
    change(fields)
    new = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file of the model."""

    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def shards(missing: str | None = None, **weight_map: str) -> Callable[[Path], None]:
    """Turn the one file into a shard with an index, with these entries added to it."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "m-1.safetensors")
        entries = {"model.norm.weight": "m-1.safetensors", **weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))

    return change


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 10)


def write(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data) and None


def renamed_tensor(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: h.update(other=h.pop("model.norm.weight")))


def as_bytes(folder: Path) -> None:
    """One weight stored as twice as many 8-bit numbers."""

    def change(fields: dict[str, Any]) -> None:
        entry = fields["model.layers.0.mlp.up_proj.weight"]
        entry["dtype"], entry["shape"] = "I8", [entry["shape"][0], 2 * entry["shape"][1]]

    header(folder / "model.safetensors", change)


def hole(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: h.pop("model.layers.2.mlp.up_proj.weight"))


def link(name: str) -> Callable[[Path], None]:
    """Move a file of the model out of its folder and leave a link."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)

    return change


SHAPE = {"shape": [512, 128]}
BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no shard": (shards(x="m-2.safetensors"), "m-2.safetensors is missing"),
    "no tensor": (shards(x="m-1.safetensors"), "m-1.safetensors lacks the tensor x"),
    "cut": (cut, "model.safetensors is truncated: "),
    "garbage": (write(b"\xff" * 64), "model.safetensors is no safetensors file"),
    "garbage header": (write(struct.pack("<Q", 4) + b"{{{{"), "its header is not JSON"),
    "deep header": (write(struct.pack("<Q", 60000) + b"[" * 60000), "its header is not JSON"),
    "empty": (write(b""), "model.safetensors is no safetensors file"),
    "hole": (hole, "the bytes of model.layers."),
    "bytes": (as_bytes, "model.layers.0.mlp.up_proj.weight is stored as I8"),
    "config": (edit("config.json", hidden_size=128), "another model than the plan's: hidden_size is 128"),
    "no config": (lambda f: (f / "config.json").write_text("[]"), "cannot read"),
    # ways out of the folder
    "absolute shard": (shards(x="/etc/passwd"), "names a file outside its folder: '/etc/passwd'"),
    "shard above": (shards(x="../m.safetensors"), "names a file outside its folder"),
    "linked weights": (link("model.safetensors"), "model.safetensors is a link to a file outside"),
    "linked tokenizer": (link("tokenizer.json"), "tokenizer.json is a link to a file outside"),
    "link to itself": (lambda f: (f / "x").symlink_to(f / "x"), "x is a link to a file outside"),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), "has no usable tokenizer"),
    "linked config": (link("config.json"), "config.json is a link to a file outside"),
    "weights by config": (edit("config.json", transformers_weights="../x.safetensors"), "names its weights"),
    "vocabulary": (edit("tokenizer_config.json", vocab_file="/etc/passwd"), "'/etc/passwd'"),
    "code": (edit("config.json", auto_map={"AutoModel": "../../x.Y"}), "names code outside its folder"),
    "pipe": (lambda f: os.mkfifo(f / "generation.json"), "generation.json is neither file nor folder"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}'),
        "holds an adapter",
    ),
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, tiny: Path) -> Path:
    """A model of one's own to break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_bad_model_is_named_before_anything_is_loaded(
    tmp_path: Path, model: Path, fault: str, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "plan.json", model, INFER, strategy())
    damage, says = BAD_MODELS[fault]
    damage(model)
    assert says in fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_shapes_other_than_the_config_asks_for_are_named_by_tensor_and_file(
    tmp_path: Path, model: Path, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "plan.json", model, INFER, strategy())
    name = "model.layers.1.mlp.up_proj.weight"
    header(model / "model.safetensors", lambda h: h[name].update(shape=[256, 512]))
    said = fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "o")
    assert f"model.safetensors: {name} has the shape 256x512 and config.json asks for 512x256" in said
    header(model / "model.safetensors", lambda h: h.update({"model.layers.1.other.weight": h.pop(name)}))
    assert f"lacks 1 tensor(s) of the model, first {name}" in fails(
        capsys, plan, "--prompt", "x", "--output", tmp_path / "o"
    )


def test_weights_that_the_config_has_no_place_for_are_told(tmp_path: Path, model: Path, capsys: Any) -> None:
    edit("config.json", num_hidden_layers=1)(model)
    plan = make_plan(tmp_path / "plan.json", model, INFER, strategy())
    said = fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "o")
    assert f"transformers cannot read {model}: " in said, "layer_types has more"
    edit("config.json", layer_types=["full_attention"])(model)
    plan = make_plan(tmp_path / "plan.json", model, INFER, strategy())
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().err
    assert f"of {model} are not in the model that config.json describes" in said
    assert "first model.layers.1." in said


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"path": "../" * 40 + "etc"}, "etc/"),
        ({"path": "x" * 5000}, "is not there"),
        ({"path": "a\0b"}, "is not there"),
        ({"path": None, "repo_id": "../../etc/x"}, "names the repository '../../etc/x'"),
        ({"path": None, "repo_id": "a/b", "revision": "../../../x"}, "names the revision"),
        ({"path": None, "repo_id": "a/b", "revision": "/etc/x"}, "names the revision"),
    ],
)
def test_a_crafted_plan_leads_nowhere(
    tmp_path: Path, tiny: Path, facts: dict[str, Any], says: str, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy(), **facts)
    assert says in fails(capsys, plan, "--prompt", "x", "--offline", "--output", tmp_path / "o")


def test_the_name_of_a_model_does_not_lead_out_of_runs(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy(), id="../../../../tmp/x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["run", str(plan), "--prompt", "x"]) == 0
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["runs"]
    assert len(list((tmp_path / "here" / "runs").iterdir())) == 1


def test_the_cache_of_the_hub_links_into_its_own_contents(tmp_path: Path, model: Path) -> None:
    from executor.containment import refuse_way_out
    from executor.errors import BadWeights

    repo = tmp_path / "models--a--b"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    folder = repo / "snapshots" / "abc"
    model.rename(folder)
    (folder / "config.json").rename(repo / "blobs" / "1")
    (folder / "config.json").symlink_to("../../blobs/1")
    refuse_way_out(folder)
    (folder / "model.safetensors").rename(repo / "elsewhere")
    (folder / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(BadWeights, match="is a link"):
        refuse_way_out(folder)


# --------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"text": "a"', "line 3: is not JSON"),
        (b"\xff\xfe", "line 3: is not UTF-8"),
        (b'{"text": 5}', 'line 3: "text" must be text'),
        (b'{"prompt": "a"}', "line 3: needs"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 3: has no assistant message"),
        (b"[" * 100_000, "line 3: is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, tiny: Path, row: bytes, says: str, capsys: Any
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b'{"text": "fine"}\n\n' + row + b"\n")
    plan = make_plan(tmp_path / "plan.json", tiny, TRAIN, strategy())
    said = fails(capsys, plan, "--dataset", data, "--output", tmp_path / "o")
    assert "rows.jsonl" in said and says in said and not (tmp_path / "o").exists()
