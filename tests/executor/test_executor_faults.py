"""What goes wrong on real machines: one clear line, the right exit code, nothing half-written or lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import make_plan, strategy

from executor.cli import main
from planner.types import Workload

pytestmark = pytest.mark.executor
TRAIN = Workload(task="train", seq_len=64, batch_size=2, method="lora")
INFER = Workload(task="infer", prompt_tokens=32, new_tokens=4)


def fails(capsys: Any, *arguments: Any) -> str:
    """`executor run` must end with exit code 2, one error line, at most one hint, nothing on stdout."""
    capsys.readouterr()
    assert main(["run", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert out == "" and "Traceback" not in err
    assert lines[0].startswith("error: ") and len(lines) <= 2 and err.splitlines()[-len(lines) :] == lines
    return "\n".join(lines)


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


# --------------------------------------------------------------------------- disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that takes no more: longer writes fail with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train(plan: Path, tiny: Path, output: Path, steps: int = 6) -> list[Any]:
    return [
        plan,
        "--dataset",
        tiny / "data.jsonl",
        "--max-steps",
        steps,
        "--save-steps",
        2,
        "--output",
        output,
    ]


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An unbroken run of six steps, checkpoints after 4 and 6; its plan lies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    plan = make_plan(folder / "plan.json", tiny, TRAIN, strategy())
    assert main(["run", *map(str, train(plan, tiny, folder / "o"))]) == 0
    return folder


def test_no_room_for_a_checkpoint(tmp_path: Path, tiny: Path, whole: Path, capsys: Any) -> None:
    plan, output = whole / "plan.json", tmp_path / "o"
    # optimizer.pt is what does not fit: torch's writer, which hides the system's reason
    size = (whole / "o" / "checkpoint-6" / "adapter_model.safetensors").stat().st_size
    for limit in (size // 2, size + 1000):
        with files_of_at_most(limit):
            said = fails(capsys, *train(plan, tiny, output))
        assert "cannot write" in said and "free)" in said and "free some space" in said
        assert not output.exists()
    assert main(["run", *map(str, train(plan, tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o")


def unfinished(whole: Path, output: Path, *without: str) -> None:
    """The state of an earlier moment of a finished run."""
    shutil.copytree(whole / "o", output)
    for name in without:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**state, "status": "unfinished"}))


def test_no_room_for_the_result_keeps_the_last_checkpoint(
    tmp_path: Path, tiny: Path, whole: Path, capsys: Any
) -> None:
    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json", "checkpoint-6")
    with files_of_at_most(50_000):
        said = fails(capsys, *train(whole / "plan.json", tiny, output))
    assert "the same command goes on from the last checkpoint" in said
    assert sorted(p.name for p in output.iterdir() if p.name != ".lock") == ["checkpoint-4", "run.json"]
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o")
    assert json.loads((output / "report.json").read_text())["resumed_from_step"] == 4


def test_no_room_for_report_or_answers(
    tmp_path: Path, tiny: Path, whole: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json")
    with monkeypatch.context() as patched:
        patched.setattr("executor.report.write_atomically", full)
        assert "report.json: No space left on device" in fails(
            capsys, *train(whole / "plan.json", tiny, output)
        )
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    assert adapter(output) == adapter(whole / "o") and (output / "report.json").exists()
    plan = make_plan(tmp_path / "infer.json", tiny, INFER, strategy())
    with monkeypatch.context() as patched:
        patched.setattr("executor.answering.write_atomically", full)
        assert "No space left" in fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, tiny: Path, whole: Path, damage: str, capsys: Any
) -> None:
    output = tmp_path / "o"
    unfinished(whole, output, "adapter", "report.json")
    victim = output / "checkpoint-6" / "optimizer.pt"
    size = victim.stat().st_size
    os.truncate(victim, size - 1)
    if damage == "zeroed":
        victim.write_bytes(bytes(size))
    if damage == "gone":
        victim.unlink()
    assert main(["run", *map(str, train(whole / "plan.json", tiny, output))]) == 0
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged: optimizer.pt" in said and "going back to checkpoint-4" in said
    assert adapter(output) == adapter(whole / "o")


def test_a_spoilt_report_or_answers_of_a_broken_off_run(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(3)))
    output = tmp_path / "o"
    run = [plan, "--prompts", prompts, "--greedy", "--output", output]
    assert main(["run", *map(str, run)]) == 0
    whole = (output / "outputs.jsonl").read_text()
    (output / "report.json").write_text("{")
    assert "cannot read the report" in fails(capsys, *run)
    (output / "report.json").unlink()
    lines = whole.splitlines(keepends=True)
    (output / "outputs.partial.jsonl").write_text(lines[0] + lines[1][:20])
    (output / "outputs.jsonl").unlink()
    assert main(["run", *map(str, run)]) == 0
    assert (output / "outputs.jsonl").read_text() == whole


def test_an_error_nobody_foresaw_is_a_line_too(
    tmp_path: Path, tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*_: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("executor.attempt.Attempt.run", strange)
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy())
    said = fails(capsys, plan, "--prompt", "x", "--output", tmp_path / "o")
    assert "(RuntimeError: first line)" in said and "--debug shows where" in said
    with pytest.raises(RuntimeError, match="second line"):
        main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o"), "--debug"])


def test_a_link_in_the_output_is_not_followed(tmp_path: Path, tiny: Path, whole: Path, capsys: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (".partial", "checkpoint-2", ".lock", "adapter"):
        output = tmp_path / f"o-{name}"
        output.mkdir()
        (output / name).symlink_to(outside)
        said = fails(capsys, *train(whole / "plan.json", tiny, output), "--restart")
        assert "link" in said or "symbolic" in said.lower() or "directory" in said.lower(), said
        assert not list(outside.iterdir()) and (output / name).is_symlink()
