"""`executor merge`: a run's adapter folded into its base, as a model that plain transformers loads.

The result has the base's dtype, files and tensor names. It is written to a hidden folder beside its place and
renamed at the end, so a kill leaves nothing that could be taken for a model; the next call sweeps it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from executor import ui
from executor.errors import BadOption, BadWeights, CannotHonour, DirectoryInUse
from executor.files import publish_folder, write_atomically
from executor.measure import HostSampler
from executor.merge_plan import Changes, find_changes
from executor.merge_write import Shard, read_shards, refuse_quantized, write_shard
from executor.quiet import silence, silence_loaded, stay_offline
from executor.stopping import StopRequest
from executor.weights import INDEX, SINGLE, check_weights
from planner.units import format_bytes

MERGE_SCHEMA = "fitwright.merge/1"
BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
"""What a model folder holds beside its weights: configs, tokenizer, chat template, its own code, terms."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge did."""

    schema: str
    output: str
    base: str
    adapter: str
    tensors: int
    changed: int
    untied: bool
    """The embeddings were one tensor and had to become two."""
    bytes: int
    """Of the weights written."""
    seconds: float
    host_peak_bytes: int | None
    """This process's own memory at most, libraries included."""


def merge(
    run: Path,
    output: Path,
    base: Path | None,
    remote_code: bool = False,
    json_: bool = False,
    debug: bool = False,
) -> int:
    """Fold the adapter of `run` (a run's folder, or an adapter's) into its base as `output`; the exit code.

    Errors: `BadOption` for a run without adapter, `BadWeights` for a base that is missing, broken or
    another model, `DirectoryInUse` for an `output` that exists, `CannotHonour` for a full disk. All exit 2.
    """
    silence(debug)
    adapter = _adapter(run)
    folder = _base(adapter, base)
    if os.path.lexists(output):
        raise DirectoryInUse(f"{output} exists; a merge only makes new folders", "give another -o")
    check_weights(folder)
    stay_offline()
    silence_loaded(debug)
    with StopRequest(), _staging(output) as staging:
        done = _merge(adapter, folder, output, staging, remote_code)
    _show(done, json_)
    return 0


def _adapter(run: Path) -> Path:
    """The folder of the adapter that `run` means."""
    for folder in (run / "adapter", run):
        if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
            return folder
    if (run / "model" / "config.json").is_file():
        raise BadOption(
            f"{run} is a full fine-tune and has no adapter to merge",
            f"{run / 'model'} is already a standalone model",
        )
    if not run.is_dir():
        what = "is no folder" if run.exists() else "is not there"
        raise BadOption(f"{run} {what}", "give the --output folder of a run")
    if (run / "outputs.jsonl").exists():
        raise BadOption(f"{run} generated text and trained nothing")
    if _is_rehearsal(run):
        raise BadOption(
            f"{run} is a rehearsal: its weights were random and nothing of it was kept",
            "train with `executor run`",
        )
    if (run / "run.json").exists():
        raise BadOption(
            f"the run in {run} is not finished and has no adapter yet",
            "the same `executor run` goes on with it; a checkpoint folder in it can be merged too",
        )
    raise BadOption(f"{run} holds no run and no adapter", "give the --output folder of a run")


def _is_rehearsal(run: Path) -> bool:
    try:
        return bool(json.loads((run / "run.json").read_text())["settings"]["rehearse"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _base(adapter: Path, given: Path | None) -> Path:
    """The folder with the weights that the adapter was trained on."""
    if given is None:
        try:
            named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
            given = Path(named)
        except (ValueError, KeyError, TypeError):
            raise BadWeights(f"cannot read {adapter / 'adapter_config.json'}") from None
    folder = given.parent if given.is_file() else given
    if not (folder / "config.json").is_file():
        raise BadWeights(
            f"the base model of {adapter} is not at {folder}",
            "give its folder (with the 16-bit weights) as --base",
        )
    return folder


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that only this process works in, gone afterwards."""
    folder = output.parent / f".{output.name}.merging"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DirectoryInUse(f"cannot write to {output.parent}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DirectoryInUse(f"another merge into {output} is at work") from None
    try:
        for left in folder.iterdir():  # of a merge that was killed
            left.unlink()
        yield folder
    except OSError as error:
        raise CannotHonour(f"cannot write {output}: {error.strerror}", "free some space there") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _merge(adapter: Path, base: Path, output: Path, staging: Path, remote_code: bool) -> Merged:
    sampler = HostSampler()
    began = time.monotonic()
    shards = read_shards(base)
    _refuse_full_disk(shards, staging, output)
    with ui.stage("reading the adapter"):
        shapes = {name: stored.shape for shard in shards for name, stored in shard.tensors.items()}
        changes = find_changes(base, adapter, shapes, remote_code)
        refuse_quantized(shards, changes)
    size, names = _write(shards, changes, staging)
    _copy_rest(base, staging, changes)
    publish_folder(staging, output)
    return Merged(
        schema=MERGE_SCHEMA,
        output=str(output),
        base=str(base),
        adapter=str(adapter),
        tensors=names,
        changed=len(changes.changed) + len(changes.added),
        untied=changes.untied,
        bytes=size,
        seconds=time.monotonic() - began,
        host_peak_bytes=sampler.stop(),
    )


def _refuse_full_disk(shards: list[Shard], staging: Path, output: Path) -> None:
    needed = sum(shard.path.stat().st_size for shard in shards)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise CannotHonour(
            f"{output} takes {format_bytes(needed)} and there are {format_bytes(free)} free",
            "free some space, or give -o on a larger disk",
        )


def _write(shards: list[Shard], changes: Changes, staging: Path) -> tuple[int, int]:
    """Write all weight files and their index; returns their bytes and the number of tensors."""
    import torch

    total = sum(len(shard.tensors) for shard in shards) + len(changes.added)
    weight_map: dict[str, str] = {}
    written = finished = 0
    with ui.Steps("merging", total) as steps, torch.no_grad():

        def done(tensor_bytes: int) -> None:
            nonlocal written, finished
            written, finished = written + tensor_bytes, finished + 1
            steps.update(finished, format_bytes(written))

        for shard in shards:
            for name in write_shard(shard, changes, staging / shard.path.name, done):
                weight_map[name] = shard.path.name
    if len(shards) > 1 or shards[0].path.name != SINGLE:
        index = {"metadata": {"total_size": written}, "weight_map": weight_map}
        write_atomically(staging / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written, total


def _copy_rest(base: Path, staging: Path, changes: Changes) -> None:
    for file in sorted({file for pattern in BESIDE_WEIGHTS for file in base.glob(pattern)}):
        if file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, staging / file.name)
    if changes.untied:
        file = staging / "config.json"
        write_atomically(file, json.dumps(_untie(json.loads(file.read_text())), indent=2) + "\n")


def _untie(config: dict[str, Any]) -> dict[str, Any]:
    untied = {**config, "tie_word_embeddings": False}
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict):
            untied[name] = {**config[name], "tie_word_embeddings": False}
    return untied


def _show(done: Merged, json_: bool) -> None:
    if json_:
        print(json.dumps(asdict(done), indent=1))
        return
    speed = done.bytes / max(done.seconds, 1e-9)
    print(
        f"{done.output}: a standalone model, {format_bytes(done.bytes)} in {done.seconds:.1f} s "
        f"({format_bytes(int(speed))}/s), {done.changed} of {done.tensors} tensors changed"
    )
    print(f"folded into the weights in {done.base}, in their own dtype")
    if done.untied:
        print("input and output embedding were one tensor and are two now (tie_word_embeddings: false)")
