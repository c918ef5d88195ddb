"""Soup's layer streaming and engine stream beside each other: same checkpoint, rows, length and cap.

    python benchmarks/streaming/soup.py --packages FOLDER [--model llama-3.1-8b] [--cap 2.5GiB 4GiB]

FOLDER has soup-cli and what it needs that is not installed, as `pip install --no-deps --target FOLDER`
leaves it: soup-cli 'trl<1' 'typer<0.28' 'click<8.5' plotext datasets dill multiprocess pydantic pydantic-core
annotated-types typing-inspection.

A checkpoint of random weights in the model's real shapes is written once, with a byte-level tokenizer and
rows longer than the sequence. Both fine-tune it in NF4, r=8 on every linear, batch 1, 8-bit Adam: Soup with
its streaming as it comes, and with its loss in chunks of tokens; ours by the best plan for the cap. A process
each, the cap set before it loads anything. Prints a JSON line a run: tokens/s after the first two steps,
allocated and process peak, or why it did not run. Exit code 1 only where ours does not. `--cpu`: a tiny model
and no caps, to try the program.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import runs  # noqa: E402  found beside this file
from soup_side import WARM_STEPS  # noqa: E402

from planner.units import parse_size  # noqa: E402

CHUNK = 256
"""Tokens of Soup's loss at a time, where it is chunked."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LONGEST_SECONDS = 300


def main() -> int:
    """Run both sides at every cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--cap", nargs="+", default=["2.5GiB", "4GiB"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, CHUNK], help="of Soup's loss; 0: none")
    parser.add_argument("--scratch", type=Path, help="where three times the weights have room")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.scratch or roomiest("/dev/shm", tempfile.gettempdir())))
    try:
        return compare(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def roomiest(*folders: str) -> str:
    """The one with the most free space of those that exist."""
    return max(filter(os.path.isdir, folders), key=lambda folder: shutil.disk_usage(folder).free)


def compare(folder: Path, args: argparse.Namespace) -> int:
    """Print every run; 1 if one of ours did not end well."""
    write(folder, args)
    failed = 0
    for cap in [None] if args.cpu else args.cap:
        ours = ours_under(folder, args, cap)
        failed += ours["error"] is not None
        show("fitwright", args, cap, ours)
        for chunk in args.chunks:
            chunk = chunk or None
            show("soup", args, cap, soup_under(folder, args, cap, chunk), loss_chunk=chunk)
    return int(failed > 0)


def show(who: str, args: argparse.Namespace, cap: str | None, row: dict[str, Any], **more: Any) -> None:
    """One line."""
    model = "tiny" if args.cpu else args.model
    first = {"who": who, "model": model, "seq_len": args.seq_len, "cap": cap, **more}
    print(json.dumps({**first, **row}), flush=True)


def write(folder: Path, args: argparse.Namespace) -> None:
    """Checkpoint and rows; in a process of its own, whose card memory is gone after that."""
    target = f"Path({str(folder / 'model')!r})"
    if args.cpu:
        make = f"from executor.tiny import write_tiny_model as write; write({target}, layers=6, kind='llama')"
    else:
        make = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import runs\n"
            "from profiles.catalogue import load_model\n"
            f"runs.write_model({target}, dict(load_model({args.model!r}).config), 'cuda')"
        )
    make = f"from pathlib import Path; {make}"
    command = [sys.executable, "-c", make]
    subprocess.run(command, env=runs.environment(folder), check=True, stdout=subprocess.DEVNULL)
    answer = runs.TEXT.read_text()
    answer = (answer * (args.seq_len // len(answer) + 2))[: args.seq_len + 64]
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": answer}]}
        for n in range(args.steps)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours_under(folder: Path, args: argparse.Namespace, cap: str | None) -> dict[str, Any]:
    """Plan for the cap, and run the plan."""
    job = ["--method", "qlora", "--quant", "nf4", "--seq-len", args.seq_len, "--lora-rank", 8]
    job += ["--lora-dropout", 0, "--loss", "fused", "--kernels", "torch", "--optimizer", "paged_adamw_8bit"]
    where = ["--placement", "cpu"] if cap is None else ["--vram", cap]
    chosen = ["--engine", "stream", "--resident-layers", 0] if cap is None else ["--vram-cap", cap]
    output = folder / f"ours-{cap}"
    try:
        plan = runs.make_plan(folder / "model", folder / f"ours-{cap}.json", [*job, *where])
    except subprocess.CalledProcessError:
        return {"error": "no plan fits"}
    command = ["run", plan, "--dataset", folder / "rows.jsonl", "--max-steps", args.steps, "--offline"]
    command += ["--save-steps", args.steps + 1]  # as Soup, which saves every hundred
    command += ["--candidate", 1, *chosen, "--output", output]
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "executor", *map(str, command)],
        env=runs.environment(folder),
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )
    row: dict[str, Any] = {"error": None, "run_seconds": round(time.monotonic() - began, 1)}
    if ended.returncode:
        return {**row, "error": ended.stderr[-300:]}
    report = json.loads((output / "report.json").read_text())
    names = ("engine", "train_tokens_per_s", "allocated_peak_bytes", "process_peak_bytes")
    names += ("layers_resident", "layers_streamed", "pinned_bytes", "link_bytes_per_s", "step_seconds")
    names += ("losses", "notes")
    shutil.rmtree(output)
    seconds = report["step_seconds"][WARM_STEPS:]
    rate = args.seq_len * len(seconds) / sum(seconds) if seconds else None
    return row | {name: report.get(name) for name in names} | {"train_tokens_per_s": rate}


def soup_under(folder: Path, args: argparse.Namespace, cap: str | None, chunk: int | None) -> dict[str, Any]:
    """Soup's side, in a process of its own."""
    work = folder / "soup"
    work.mkdir(exist_ok=True)
    (work / "soup.yaml").write_text(settings(folder, args, cap, chunk))
    env = runs.environment(folder)
    # its layer cache is under the home folder, and is kept from one run to the next
    env |= {"HOME": str(folder), "PYTHONPATH": os.pathsep.join([str(args.packages), env["PYTHONPATH"]])}
    size = parse_size(cap) if cap else 0
    command = [sys.executable, HERE / "soup_side.py", work / "soup.yaml", args.steps, size]
    began = time.monotonic()
    try:
        ended = subprocess.run(
            list(map(str, command)), env=env, capture_output=True, text=True, timeout=LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LONGEST_SECONDS} s"}
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    row = json.loads(lines[-1]) if lines else {"error": ended.stderr[-500:]}
    each = row.pop("seconds_per_step", None)
    row["train_tokens_per_s"] = args.seq_len / each if each else None
    return row | {"run_seconds": round(time.monotonic() - began, 1)}


def settings(folder: Path, args: argparse.Namespace, cap: str | None, chunk: int | None) -> str:
    """soup.yaml. The driver does not show it the cap, so it is told."""
    training: dict[str, Any] = {
        "epochs": 1,
        "lr": 1e-4,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "quantization": "4bit",
        "optimizer": "adamw_torch" if args.cpu else "paged_adamw_8bit",
        "logging_steps": 1,
        "stream_layers": True,
        "lora": {"r": 8, "alpha": 32, "dropout": 0.0, "target_modules": list(LINEARS)},
    }
    if cap is not None:
        training["stream_vram_override"] = parse_size(cap)
    if chunk is not None:
        training["stream_loss_chunk"] = chunk
    data = {
        "train": str(folder / "rows.jsonl"),
        "format": "chatml",
        "val_split": 0.0,
        "max_length": args.seq_len,
    }
    whole = {"base": str(folder / "model"), "task": "sft", "data": data, "training": training}
    return json.dumps({**whole, "output": str(folder / "soup" / "out")})  # JSON is YAML


if __name__ == "__main__":
    sys.exit(main())
