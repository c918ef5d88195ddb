"""`executor quickstart`: the whole way once, on a model that needs no download, no GPU and no patience.

Checks a real model against this machine, then plans, fine-tunes, loads back and asks a tiny one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from executor import ui
from executor.errors import FitwrightError
from executor.options import RunOptions
from executor.quiet import silence, silence_loaded, stay_offline

CHECKED_MODEL = "qwen2.5-7b"
QUESTION = "What is LoRA?"
SEQ_LEN, BATCH, STEPS = 128, 4, 40


def quickstart(output: Path | None, debug: bool = False) -> int:
    """Run all steps; returns the exit code.

    Errors: subclasses of `FitwrightError`; the folder is kept.
    """
    silence(debug)
    stay_offline()
    # matrices this small gain nothing from threads, and lose much where other programs hold one up
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="fitwright-quickstart-")) if output is None else output
    _heading(f"planner check {CHECKED_MODEL}", "will a real model run here?")
    _planner(["check", CHECKED_MODEL], allowed=(0, 1))
    model, dataset = _make_model(folder)
    silence_loaded(debug)
    plan = folder / "plan.json"
    job = ["--task", "train", "--method", "qlora", "--seq-len", str(SEQ_LEN), "--batch-size", str(BATCH)]
    _heading(f"planner plan {model} {' '.join(job)} -o {plan}", "how to fine-tune the tiny model")
    _planner(["plan", str(model), *job, "-o", str(plan)], allowed=(0,))
    run_folder = folder / "run"
    _heading(
        f"executor run {plan} --dataset {dataset} --output {run_folder} --max-steps {STEPS}",
        "carry the plan out",
    )
    _train(plan, dataset, run_folder, debug)
    _heading(
        "peft.PeftModel.from_pretrained(model, adapter)", "load the adapter back with plain peft and ask it"
    )
    answer = _ask(model, run_folder / "adapter")
    print(f"{QUESTION} → {answer!r}")
    print(f"({STEPS} steps teach a model of this size letters, not sense.)")
    _farewell(folder, plan)
    return 0


def _planner(arguments: list[str], allowed: tuple[int, ...]) -> None:
    from planner.cli import main

    code = main(arguments)
    sys.stdout.flush()
    if code not in allowed:
        raise FitwrightError(f"`planner {arguments[0]}` ended with exit code {code}")


def _make_model(folder: Path) -> tuple[Path, Path]:
    model, dataset = folder / "tiny", folder / "quickstart.jsonl"
    with ui.stage("making a tiny model with random weights"):
        from executor.tiny import write_tiny_model

        write_tiny_model(model)
        with resources.as_file(resources.files("executor") / "data" / "quickstart.jsonl") as rows:
            shutil.copyfile(rows, dataset)
    return model, dataset


def _train(plan: Path, dataset: Path, output: Path, debug: bool) -> None:
    from executor.run import run

    run(
        RunOptions(
            plan=plan,
            dataset=dataset,
            output=output,
            max_steps=STEPS,
            learning_rate=1e-3,
            restart=True,
            offline=True,
            debug=debug,
        )
    )


def _ask(model: Path, adapter: Path) -> str:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    messages = [{"role": "user", "content": QUESTION}]
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = tuned.generate(**batch, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def _heading(command: str, purpose: str) -> None:
    sys.stdout.flush()
    print(f"\n── {purpose}\n$ {command}", flush=True)


def _farewell(folder: Path, plan: Path) -> None:
    print(
        f"\nEverything is in {folder}: the model (tiny/), {plan.name}, the adapter (run/adapter/)\n"
        "and the report (run/report.json).\nNext:\n"
        f"  planner check {CHECKED_MODEL} --gpu rtx-3090          another card\n"
        f"  planner plan {CHECKED_MODEL} --task train -o plan.json   a plan for this machine\n"
        "  executor rehearse plan.json                      its memory and speed before any download\n"
        "  executor run plan.json --dataset rows.jsonl      carry it out"
    )
