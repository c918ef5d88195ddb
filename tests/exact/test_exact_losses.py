"""No loss but the full one holds all logits; liger's code runs without a card."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the [executor] extra")

from tiny_models import tiny  # noqa: E402

from planner.exact.trace import trace_job  # noqa: E402
from planner.types import Strategy, Workload  # noqa: E402

pytestmark = pytest.mark.executor


@pytest.mark.parametrize("how", [Strategy(loss="fused"), Strategy(kernels="liger")], ids=["fused", "liger"])
def test_no_end_holds_all_logits(how: Strategy) -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    facts = tiny("llama", 20_000)
    work = Workload(task="train", method="lora", seq_len=1024)
    full, other = (trace_job(facts, work, x, 0).memory.by_moment["loss"] for x in (Strategy(), how))
    logits = 1024 * 20_000 * 4
    assert full - other > logits


def test_liger_leaves_the_modelling_file_as_it_was() -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    trace_job(
        tiny("llama", 64), Workload(task="train", method="lora", seq_len=64), Strategy(kernels="liger"), 0
    )
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm) == before
