"""Every integer of some forty estimates. A change here is meant, or it is a mistake.

After a change that is meant: `pytest tests/golden --update-golden`, and look at the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.estimate import estimate
from planner.machine import machine_from_gpus
from planner.types import GpuEstimate, Strategy, Workload
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

TABLE = Path(__file__).with_name("estimates.json")

INFER = Workload(task="infer")
NF4, INT8 = Strategy(quant="nf4"), Strategy(quant="int8")
QLORA = Strategy(quant="nf4", optimizer="paged_adamw_8bit")


def train(method: str = "qlora", **changes: Any) -> Workload:
    return Workload(task="train", method=method, **changes)


Cell = tuple[str, str, Workload, Strategy]
CELLS: dict[str, Cell] = {
    "bf16": ("qwen2.5-7b", "h200", INFER, Strategy()),
    "nf4": ("qwen2.5-7b", "rtx-3090", INFER, NF4),
    "int8": ("qwen2.5-7b", "rtx-4090", INFER, INT8),
    "fp32": ("qwen2.5-0.5b", "rtx-3060-12gb", INFER, Strategy(dtype="fp32")),
    "long prompt": ("llama-3.1-8b", "h200", Workload(task="infer", prompt_tokens=32768), NF4),
    "long answer": (
        "llama-3.1-8b", "rtx-4090", Workload(task="infer", prompt_tokens=16, new_tokens=8192), NF4,
    ),
    "many at once": ("qwen3-4b", "rtx-4090", Workload(task="infer", batch_size=4, concurrency=4), Strategy()),
    "static cache": ("mistral-7b-v0.3", "rtx-4090", INFER, Strategy(cache="static")),
    "offloaded cache": (
        "llama-3.1-8b", "rtx-4090", Workload(task="infer", prompt_tokens=16384), Strategy(cache="offloaded"),
    ),
    "quantized cache": (
        "llama-3.1-8b", "rtx-4090", Workload(task="infer", prompt_tokens=16384), Strategy(cache="quantized"),
    ),
    "eager with caps": ("gemma-2-2b", "rtx-3090", INFER, Strategy(attention="eager")),
    "sliding window": ("gemma-3-12b-it", "h200", Workload(task="infer", prompt_tokens=8192), Strategy()),
    "latent attention": ("deepseek-v2-lite", "h200", Workload(task="infer", prompt_tokens=8192), Strategy()),
    "fused experts": ("mixtral-8x22b-v0.1", "h200", INFER, NF4),
    "quantized experts": ("mixtral-8x22b-v0.1", "h200", INFER, Strategy(quant="nf4", quant_experts="nf4")),
    "recurrent": ("qwen3-next-80b-a3b-instruct", "h200", Workload(task="infer", prompt_tokens=8192), NF4),
    "shared caches": ("gemma-3n-e4b-it", "rtx-3090", INFER, Strategy()),
    "tower": ("qwen2-vl-2b-instruct", "rtx-3060-12gb", INFER, Strategy()),
    "parallel layers": ("falcon-40b", "h200", INFER, INT8),
    "ram offload": ("qwen2.5-14b", "rtx-3060-12gb", INFER, Strategy(placement="mixed_offload")),
    "disk offload": ("llama-3.3-70b-instruct", "rtx-3090", INFER, Strategy(placement="disk_offload")),
    "two cards": ("qwen2.5-14b", "rtx-3090x2", INFER, Strategy()),
    "another vendor": ("qwen2.5-7b", "mi300x", INFER, Strategy()),
    "unified memory": ("qwen2.5-7b", "m3-max-128gb", INFER, NF4),
    "qlora": ("qwen2.5-7b", "rtx-3090", train(), QLORA),
    "qlora fused loss": ("qwen2.5-7b", "rtx-3090", train(), Strategy(
        quant="nf4", optimizer="paged_adamw_8bit", loss="fused", kernels="liger",
    )),
    "qlora prepared": ("qwen2.5-7b", "rtx-3090", train(), Strategy(
        quant="nf4", optimizer="paged_adamw_8bit", upcast_frozen=True,
    )),
    "qlora recorded": ("qwen2.5-7b", "rtx-3090", train(seq_len=512), Strategy(
        quant="nf4", optimizer="paged_adamw_8bit", gradient_checkpointing=False,
    )),
    "qlora offloaded": ("llama-3.1-8b", "rtx-3090", train(seq_len=8192), Strategy(
        quant="nf4", optimizer="paged_adamw_8bit", activation_offload=True, loss="fused",
    )),
    "qlora int8": ("qwen2.5-7b", "h200", train(), Strategy(quant="int8", optimizer="adamw_8bit")),
    "rank 64": ("llama-3.1-8b", "rtx-4090", train(lora_rank=64, batch_size=2), QLORA),
    "attention only": ("llama-3.1-8b", "rtx-4090", train(lora_targets="attention"), QLORA),
    "dora": ("llama-3.2-1b", "rtx-4090", train("lora", lora_variant="dora"), Strategy()),
    "bf16 adapters": ("qwen2.5-7b", "h200", train("lora", adapter_dtype="bf16"), Strategy()),
    "lora recorded": (
        "qwen2.5-1.5b", "h200", train("lora", batch_size=4), Strategy(gradient_checkpointing=False),
    ),
    "lora eager": ("gemma-2-2b", "h200", train("lora", seq_len=1024), Strategy(attention="eager")),
    "lora fused experts": ("qwen3-30b-a3b", "h200", train("lora"), Strategy()),
    "full fused adamw": ("qwen2.5-0.5b", "rtx-3090", train("full", seq_len=1024, batch_size=4), Strategy()),
    "full foreach adamw": ("llama-3.2-1b", "rtx-3090", train("full"), Strategy(optimizer="adamw_torch")),
    "full 8-bit": ("llama-3.1-8b", "h200", train("full", seq_len=1024), Strategy(optimizer="adamw_8bit")),
    "full accumulated": (
        "llama-3.2-1b", "rtx-4090", train("full", gradient_accumulation_steps=8),
        Strategy(optimizer="lion_32bit"),
    ),
    "full adafactor": ("qwen2.5-3b", "h200", train("full"), Strategy(optimizer="adafactor")),
}  # fmt: skip


def figures(gpu: GpuEstimate) -> dict[str, Any]:
    """Every integer of an estimate, and what names them."""
    plain = msgspec.to_builtins(gpu)
    components = {line.name: line.bytes for line in gpu.components}
    kept = {key: plain[key] for key in plain if key.endswith("_bytes")}
    return {**kept, "peak_moment": gpu.peak_moment, "moments": gpu.moments, "components": components}


def run(cell: Cell) -> dict[str, Any]:
    model, card, work, how = cell
    name, count = (card.removesuffix("x2"), 2) if card.endswith("x2") else (card, 1)
    machine = machine_from_gpus([(load_gpu(name), count)])
    found = estimate(load_model(model), machine, work, how)
    return {
        "model": model,
        "gpu": card,
        "verdict": found.verdict,
        "gpus": [figures(gpu) for gpu in found.gpus],
        "ram_bytes": found.host.ram_bytes,
        "disk_bytes": found.disk.bytes,
        "layers_on_gpu": found.placement.layers_on_gpu,
    }


def test_update(update_golden: bool) -> None:
    if not update_golden:
        pytest.skip("tables are written with --update-golden")
    text = json.dumps({name: run(cell) for name, cell in CELLS.items()}, indent=1) + "\n"
    draft = TABLE.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, TABLE)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def test_the_table_holds_these_cells(table: dict[str, Any]) -> None:
    assert list(table) == list(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_figures_are_those_of_the_table(name: str, table: dict[str, Any]) -> None:
    assert run(CELLS[name]) == table[name]
