"""A model whose layers are all on disk, beside the disk's own rate and beside accelerate's disk offload.

    python benchmarks/streaming/disk.py [--model qwen2.5-7b] [--passes 8] [--folder DIR]

Random weights in the real shapes, made on the card. Engine stream has them in NF4 and reads every layer from
disk in every pass; engine accelerate, for two tokens, in bf16 (transformers quantizes nothing that is
offloaded). Before every pass the page cache is told to forget the files, whose dirty pages were written out
before. The disk's rate is the best of direct sequential reads of the same file by 1, 2, 4 and 8 threads,
measured in this process before and after. DIR must be on the disk that is meant, with room for the model in
bf16. One JSON line is appended to disk.jsonl and printed; about two minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402  found beside this folder

from executor.engines import LoadRequest, accelerate, stream  # noqa: E402
from executor.environment import describe  # noqa: E402
from executor.source import ModelSource  # noqa: E402
from executor.streaming.direct_io import DirectFile, aligned_memory  # noqa: E402
from executor.streaming.ring import DiskBlock  # noqa: E402
from planner.estimate import estimate  # noqa: E402
from planner.machine import machine_from_gpus  # noqa: E402
from planner.placement import Split, Tiers, offload_map, stream_map  # noqa: E402
from planner.types import Candidate, Quant, Strategy, Workload  # noqa: E402
from profiles.architecture import architecture  # noqa: E402
from profiles.catalogue import load_model  # noqa: E402
from profiles.hardware import load_gpu  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PROMPT_TOKENS = 32
STRETCH = 16 * 2**20
MOST_READ = 6 * 2**30


def main() -> int:
    """Measure; 0 if it could be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", help="a catalogue id")
    parser.add_argument("--passes", type=int, default=8, help="decode steps measured under engine stream")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where the layers are written")
    parser.add_argument("--stream-only", action="store_true", help="leave accelerate away")
    parser.add_argument("--results", type=Path, default=HERE / "disk.jsonl")
    args = parser.parse_args()
    began = time.monotonic()
    row: dict[str, Any] = {
        "command": f"python benchmarks/streaming/disk.py --model {args.model} --passes {args.passes}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "model": args.model,
    }
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="disk-benchmark-") as folder:
        row["stream"] = measure_stream(args.model, Path(folder), args.passes)
        if not args.stream_only:
            row["accelerate"] = measure_accelerate(args.model, Path(folder))
            rates = (row[engine]["decode_tokens_per_s"] for engine in ("stream", "accelerate"))
            row["stream_over_accelerate"] = next(rates) / next(rates)
    row |= {"seconds": round(time.monotonic() - began, 1), "environment": describe(DEVICE)}
    with open(args.results, "a") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "environment"}, indent=1))
    return 0


def request(model: str, engine: str, quant: Quant, folder: Path) -> LoadRequest:
    """To load random weights with every layer on disk."""
    profile = load_model(model)
    arch = architecture(profile.config)
    tiers = Tiers(0, on_disk=arch.layers)
    placed = stream_map(arch, tiers) if engine == "stream" else offload_map(arch, Split(0, 0), "disk")
    how = Strategy(placement="disk_offload", quant=quant, engine=engine)  # type: ignore[arg-type]
    job = Workload(task="infer", prompt_tokens=PROMPT_TOKENS)
    answer = estimate(profile, machine_from_gpus([(load_gpu("h200"), 1)]), job, Strategy(quant=quant))
    candidate = Candidate(
        rank=1,
        strategy=how,
        engine=how.engine,
        device_map=placed.device_map,
        estimate=answer,
        speed=answer.speed,
    )
    return LoadRequest(
        source=ModelSource(None, dict(profile.config)),
        candidate=candidate,
        workload=job,
        device=DEVICE,
        scratch=folder / engine,
        seed=3,
    )


# --------------------------------------------------------------------------- the two engines


def measure_stream(model: str, folder: Path, passes: int) -> dict[str, Any]:
    """Rates of engine stream and of the disk below it."""
    began = time.monotonic()
    loaded = stream.load(request(model, "stream", "nf4", folder))
    load_seconds = time.monotonic() - began
    blocks = [layer.slab for layer in loaded.traffic.__self__.layers]  # type: ignore[attr-defined]
    file: DirectFile = blocks[0].file
    size = sum(block.nbytes for block in blocks)
    disk = disk_rates(file, blocks)
    steps = decode(loaded.model, passes, lambda: forget([file.handle]))
    traffic = loaded.traffic()
    after = disk_rates(file, blocks)
    loaded.close()
    best = max(*disk.values(), *after.values())
    rate = size * len(steps) / sum(steps)
    return {
        "load_seconds": round(load_seconds, 1),
        "layers_on_disk": loaded.layers_on_disk,
        "bytes_a_pass": size,
        "pinned_bytes": loaded.pinned_bytes,
        "direct_reads_bytes_per_s": {"before": disk, "after": after},
        "best_direct_bytes_per_s": best,
        "decode_bytes_per_s": rate,
        "share_of_disk": rate / best,
        "while_reading_bytes_per_s": traffic["disk_bytes_per_s"],
        "decode_tokens_per_s": len(steps) / sum(steps),
        "step_seconds": [round(step, 4) for step in steps],
    }


def measure_accelerate(model: str, folder: Path) -> dict[str, Any]:
    """Two tokens of accelerate's disk offload of the same model in bf16."""
    asked = request(model, "accelerate", "none", folder)
    began = time.monotonic()
    loaded = accelerate.load(asked)
    load_seconds = time.monotonic() - began
    os.sync()
    handles = [os.open(path, os.O_RDONLY) for path in asked.scratch.rglob("*") if path.is_file()]
    size = sum(os.fstat(handle).st_size for handle in handles)
    steps = decode(loaded.model, 2, lambda: forget(handles), warm=0, counted=False)
    for handle in handles:
        os.close(handle)
    loaded.close()
    return {
        "load_seconds": round(load_seconds, 1),
        "bytes_a_pass": size,
        "decode_bytes_per_s": size * len(steps) / sum(steps),
        "decode_tokens_per_s": len(steps) / sum(steps),
        "step_seconds": [round(step, 4) for step in steps],
    }


def decode(
    model: Any, passes: int, before: Callable[[], None], warm: int = 2, counted: bool = True
) -> list[float]:
    """Seconds of each of `passes` decode steps after a prompt and `warm` steps.

    `before` runs before each pass. It is `counted` where reads go on meanwhile.
    """
    ids = torch.randint(0, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seconds = []
    with torch.inference_mode():
        before()
        step = model(ids, use_cache=True)
        for _ in range(warm + passes):
            _settle()
            began = time.perf_counter()
            before()
            began = began if counted else time.perf_counter()
            token = step.logits[:, -1:].argmax(-1)
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
            _settle()
            seconds.append(time.perf_counter() - began)
    return seconds[warm:]


def _settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------- the disk


def forget(handles: Iterable[int]) -> None:
    """Tell the page cache to drop what it holds of these files."""
    for handle in handles:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(file: DirectFile, blocks: list[DiskBlock]) -> dict[str, float]:
    """Bytes per second of sequential direct reads by numbers of threads."""
    file.flush()
    forget([file.handle])
    end = min(MOST_READ, blocks[-1].offset + blocks[-1].nbytes)
    return {str(threads): _read_rate(file, end, threads) for threads in (1, 2, 4, 8)}


def _read_rate(file: DirectFile, end: int, threads: int) -> float:
    memory: dict[int, torch.Tensor] = {}

    def read(at: int) -> None:
        own = memory.get(threading.get_ident())
        if own is None:
            own = memory[threading.get_ident()] = aligned_memory(STRETCH)
            own.zero_()  # pages are there before they are needed
        file.read(own[: min(STRETCH, end - at)], at)

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(read, range(0, end, STRETCH)))
        return end / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
