"""Pack a model from safetensors and start it from the slab file, beside the disk's own rates.

    python benchmarks/streaming/pack.py [--folder DIR] [--model qwen2.5-14b] [--quant nf4] [--check]

Writes a checkpoint of random bf16 weights in the model's real shapes into DIR (which needs room for it and
for the slab file), then in processes of their own:

- `executor pack`, the checkpoint dropped from the page cache: seconds against (bytes read / read rate + bytes
  written / write rate), and host memory above the start. The rates are of this disk and run: the best of
  direct and buffered reads of the checkpoint, dropped from the cache before; direct writes by four threads
  and fsync.
- a second start, the slab file dropped from the cache: from the first byte asked for to the first token, with
  modules imported and the card ready before; bytes of the file per second against the best read of the file
  itself. The same pass again tells what of it is computing: on a CPU nearly all, so only a card's share says
  much.

--check compares the logits of that start with those of a load without the file. One JSON line is appended to
pack.jsonl and printed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from disk_rates import drop, read_rate, write_rate  # noqa: E402  found beside this file

GIB = 2**30
SHARD = 2 * GIB


def main() -> int:
    """Measure; 0 when everything ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--model", default="qwen2.5-14b", help="a catalogue id")
    parser.add_argument("--quant", default="nf4", choices=("nf4", "int8", "none"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "pack.jsonl")
    parser.add_argument("--start", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start is not None:
        print(json.dumps(second_start(args.start, args.quant, args.check)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="pack-") as scratch:
        row = measure(Path(scratch), args.model, args.quant, args.check)
    with open(args.results, "a") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")
    print(json.dumps(row, indent=1))
    return 0


def measure(scratch: Path, model: str, quant: str, check: bool) -> dict[str, Any]:
    """The whole comparison for one model."""
    folder = scratch / "model"
    began = time.monotonic()
    shards = write_checkpoint(folder, model)
    made = time.monotonic() - began
    os.environ["FITWRIGHT_HOME"] = str(scratch / "home")
    read, write = read_rate(shards), write_rate(scratch)
    drop(shards)
    packed = run([sys.executable, "-m", "executor", "pack", str(folder), "--quant", quant, "--json"])
    slab = Path(packed["path"])
    layer = largest_layer(slab)
    ideal = packed["checkpoint_bytes"] / read + packed["bytes"] / write
    drop([slab])
    start = [
        sys.executable,
        __file__,
        "--start",
        str(folder),
        "--quant",
        quant,
        *(["--check"] if check else []),
    ]
    started = run(start)
    return {
        "model": model,
        "command": f"python benchmarks/streaming/pack.py --model {model} --quant {quant}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "checkpoint_seconds": made,
        "read_bytes_per_s": read,
        "write_bytes_per_s": write,
        "pack": packed,
        "pack_wall_over_ideal": packed["seconds"] / ideal,
        "pack_host_over_limit": packed["host_peak_bytes"] / (2 * layer + GIB),
        "layer_bytes": layer,
        "start": started,
    }


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object that a process prints."""
    root = HERE.parents[1]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


# --------------------------------------------------------------------------- the checkpoint


def write_checkpoint(folder: Path, model: str) -> list[Path]:
    """Random weights as `save_pretrained` lays them out, several shards at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from executor.load import make_config
    from executor.tiny import byte_tokenizer
    from profiles.catalogue import load_model

    config = make_config(dict(load_model(model).config))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items() if name not in tied}
    groups = list(_groups(shapes))
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def write(name: str, group: list[str]) -> Path:
        tensors = {key: torch.empty(shapes[key], dtype=torch.bfloat16, device=device) for key in group}
        for tensor in tensors.values():
            tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        save_file({key: t.cpu() for key, t in tensors.items()}, folder / name, {"format": "pt"})
        return folder / name

    with ThreadPoolExecutor(4) as pool:
        shards = list(pool.map(write, names, groups))
    weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    size = sum(path.stat().st_size for path in shards)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return shards


def _groups(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2
        for length in shape:
            nbytes *= length
        if group and size + nbytes > SHARD:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    yield group


def largest_layer(slab: Path) -> int:
    """Bytes of the largest layer of a slab file."""
    from executor.streaming.slab_file import SlabFile

    return max(layer.nbytes for layer in SlabFile.open(slab).layers)


# --------------------------------------------------------------------------- the second start


def second_start(folder: Path, quant: str, check: bool) -> dict[str, Any]:
    """Load from the slab file and make one token, in a process that has only done this."""
    import torch
    from transformers import core_model_loading, modeling_utils  # noqa: F401  libraries first: names are lazy

    from executor.engines import stream
    from executor.quiet import silence, silence_loaded
    from executor.streaming import slab_load

    silence(debug=False)
    silence_loaded(debug=False)
    request = _request(folder, quant)
    _warm(request.device)
    _import_all(folder)
    known = set(sys.modules)
    began: list[float] = []
    stock = slab_load.SlabReader

    def reader(*args: Any, **kwargs: Any) -> Any:
        began.append(time.perf_counter())
        return stock(*args, **kwargs)

    slab_load.SlabReader = reader  # type: ignore[assignment,misc]
    called = time.perf_counter()
    loaded = stream.load(request)
    ready = time.perf_counter()
    ids = torch.arange(16, device=request.device)[None]
    with torch.no_grad():
        token = loaded.model(ids, use_cache=True).logits[:, -1].argmax(-1).item()
    first_token = time.perf_counter()
    with torch.no_grad():
        loaded.model(ids, use_cache=True).logits[:, -1].argmax(-1).item()
    again = time.perf_counter() - first_token
    (path,) = folder.glob("*.slab")
    size = path.stat().st_size
    rate = read_rate([path])
    row = {
        "slab_bytes": size,
        "first_byte_to_first_token_seconds": first_token - began[0],
        "call_to_first_byte_seconds": began[0] - called,
        "loaded_to_first_token_seconds": first_token - ready,
        "same_pass_again_seconds": again,
        "bytes_per_s": size / (first_token - began[0]),
        "disk_bytes_per_s": rate,
        "share_of_disk": size / (first_token - began[0]) / rate,
        "layers_resident": loaded.layers_resident,
        "token": token,
        "modules_imported_meanwhile": len(set(sys.modules) - known),
        "notes": loaded.notes,
    }
    if check:
        row["equal_without_file"] = _equal_without_file(folder, path, request, loaded, ids)
    return row


def _request(folder: Path, quant: Any) -> Any:
    """To load with half of the layers on the card."""
    import torch

    from executor.engines import LoadRequest
    from executor.source import ModelSource
    from planner.estimate import estimate
    from planner.machine import machine_from_gpus
    from planner.types import Candidate, Strategy, Workload
    from profiles.catalogue import profile_from_config
    from profiles.config import load_config_file
    from profiles.hardware import load_gpu

    on_card = torch.cuda.is_available()
    profile = profile_from_config(load_config_file(str(folder)), "packed")
    how, job = Strategy(quant=quant, placement="full_gpu" if on_card else "cpu"), Workload(task="infer")
    answer = estimate(profile, machine_from_gpus([(load_gpu("h200"), 1)]), job, how)
    candidate = Candidate(
        rank=1, strategy=how, engine="stream", device_map={"": 0}, estimate=answer, speed=answer.speed
    )
    return LoadRequest(
        source=ModelSource(folder, dict(profile.config)),
        candidate=candidate,
        workload=job,
        device=torch.device("cuda", 0) if on_card else torch.device("cpu"),
        scratch=folder / "scratch",
        seed=0,
        resident_layers=profile.config["num_hidden_layers"] // 2,
    )


def _warm(device: Any) -> None:
    """What belongs to starting a card: all that the executor does before it loads a model, and the context's
    first NF4 kernels."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from executor.card import Card

    if device.type == "cuda":
        Card().open(device, torch.bfloat16, train=False)
    x = torch.randn(256, 256, dtype=torch.bfloat16, device=device)
    packed, state = quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    (x @ dequantize_4bit(packed, state)).sum().item()


_IMPORTED_BY_LOADING = (
    "transformers.generation.utils",
    "transformers.integrations.bitsandbytes",
    "executor.engines.accelerate",
    "executor.packed_experts",
    "executor.streaming.linears",
    "executor.streaming.saved",
    "executor.streaming.slab_use",
    "planner.inspect.live",
)


def _import_all(folder: Path) -> None:
    """Modules that a load imports on its way: those above, the model's and its tokenizer's."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name in _IMPORTED_BY_LOADING:
        importlib.import_module(name)
    AutoTokenizer.from_pretrained(folder)
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]


def _equal_without_file(folder: Path, slab: Path, request: Any, loaded: Any, ids: Any) -> bool:
    import torch

    from executor.engines import stream

    with torch.no_grad():
        want = loaded.model(ids).logits.cpu()
    loaded.close()
    loaded.model = None
    if request.device.type == "cuda":
        torch.cuda.empty_cache()
    slab.rename(slab.with_suffix(".away"))
    again = stream.load(request)
    assert not any("slab file" in note for note in again.notes)
    with torch.no_grad():
        return torch.equal(again.model(ids).logits.cpu(), want)


if __name__ == "__main__":
    sys.exit(main())
