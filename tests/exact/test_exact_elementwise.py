"""Bytes and launches beside large products, counted in closed form, against the operators that really run."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch", reason="needs the [executor] extra")

import torch
from msgspec.structs import replace
from torch.utils._pytree import tree_leaves

from planner.elementwise import elementwise
from planner.exact import trace
from planner.exact.storages import Storages
from planner.types import Strategy, Workload
from profiles.architecture import architecture
from profiles.catalogue import load_model

pytestmark = pytest.mark.executor

SHORT = 64
"""A side no longer than this makes a product as quick as its bytes."""
LEFT_OUT = {
    *("empty_like", "empty", "empty_strided", "new_empty", "_unsafe_view", "detach"),  # launch nothing
    *("dequantize_4bit", "dequantize_blockwise"),  # have a time of their own
}


class Counting(Storages):
    """Adds up what operators of decoder layers read and write; of the first one backward has less to do."""

    seen: Counter[tuple[str, str]]

    def __init__(self, major: int) -> None:
        super().__init__(major)
        type(self).seen = self.sums = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.name().split("::")[-1].split(".")[0]
        if self.segments and self.segments[-1].layer and not func.is_view and name not in LEFT_OUT:
            phase = self.segments[-1].phase
            self.sums[phase, "kernels"] += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            if not _large_product(name, tensors):
                self.sums[phase, "bytes"] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def _large_product(name: str, tensors: list[Any]) -> bool:
    if name not in ("mm", "addmm"):
        return name == "gemm_4bit"
    return min(*tensors[-3].shape[-2:], tensors[-2].shape[-1]) > SHORT


JOBS = {
    "full": ("qwen2.5-0.5b", Workload(task="train", method="full", seq_len=1024), Strategy()),
    "lora": ("llama-3.2-3b", Workload(task="train", method="lora", seq_len=1024), Strategy()),
    "norms of heads": ("qwen3-4b", Workload(task="train", method="lora", seq_len=1024), Strategy()),
    "16-bit adapters": (
        "qwen2.5-1.5b",
        Workload(task="train", method="lora", adapter_dtype="bf16", seq_len=1024),
        Strategy(),
    ),
    "no dropout": (
        "qwen2.5-1.5b",
        Workload(task="train", method="lora", lora_dropout=0.0, seq_len=1024),
        Strategy(),
    ),
    "attention only": (
        "mistral-7b-v0.1",
        Workload(task="train", method="lora", lora_targets="attention", seq_len=1024),
        Strategy(),
    ),
    "qlora": ("llama-3.1-8b", Workload(task="train", seq_len=1024), Strategy(quant="nf4")),
    "joined projections": (
        "phi-3-mini-4k-instruct",
        Workload(task="train", method="lora", seq_len=1024),
        Strategy(),
    ),
    "norms in float32": ("gemma-3-1b-it", Workload(task="train", method="lora", seq_len=1024), Strategy()),
}


@pytest.mark.parametrize("job", JOBS)
def test_counts_are_those_of_the_operators_that_run(job: str) -> None:
    name, work, how = JOBS[job]
    how = replace(how, gradient_checkpointing=False, optimizer="sgd")
    facts = load_model(name).config
    arch = architecture(facts)
    with mock.patch.object(trace, "Storages", Counting):
        layers = trace.trace_job(facts, work, how, 0).layers
    assert layers is not None
    seen, times = Counting.seen, arch.layers / (len(layers.kept) - 1)
    one, two = (elementwise(replace(arch, order=arch.order * n), work, how) for n in (1, 2))
    for phase in ("forward", "backward"):
        moved = seen[phase, "bytes"] * times
        counted = getattr(two, f"{phase}_bytes") - getattr(one, f"{phase}_bytes")
        assert counted * work.seq_len == pytest.approx(moved, rel=0.05)
        launched = seen[phase, "kernels"] * times
        counted = getattr(two, f"{phase}_kernels") - getattr(one, f"{phase}_kernels")
        assert counted == pytest.approx(launched, rel=0.08)
