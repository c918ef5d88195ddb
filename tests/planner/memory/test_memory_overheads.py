"""What no tensor accounts for: context, workspaces, allocator slack."""

from __future__ import annotations

import pytest
from memory_cases import how, known, tiny, train

from planner.memory.infer import inference_memory
from planner.memory.moments import CardMemory, line, snapshot
from planner.memory.overheads import context, cublas_workspace, slack
from planner.memory.train import training_memory
from planner.types import Strategy, Workload
from profiles.hardware import load_gpu

MIB = 2**20
INFER = Workload(task="infer")


@pytest.mark.parametrize(
    ("card", "mib"), [("h200", 32), ("rtx-3090", 8.125), ("rtx-5090", 12), ("mi300x", 8.125)]
)
def test_cublas_workspace_by_generation(card: str, mib: float) -> None:
    assert cublas_workspace(load_gpu(card)) == int(mib * MIB)


def test_no_card_no_known_generation() -> None:
    assert cublas_workspace(None) == int(8.125 * MIB)


class TestContext:
    def test_where_it_was_measured(self) -> None:
        found = context(load_gpu("h200"), tiny(), INFER, Strategy())
        assert found.measured and found.typical == 678 * MIB
        assert found.low == int(found.typical * 0.94) and found.high == int(found.typical * 1.06)

    def test_training_int8_and_caches_load_more_kernels(self) -> None:
        card = load_gpu("h200")
        routed = tiny(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
        plain = context(card, tiny(), INFER, Strategy()).typical
        assert context(card, tiny(), INFER, Strategy(quant="int8")).typical == plain + 78 * MIB
        assert context(card, tiny(), INFER, Strategy(cache="static")).typical == plain + 70 * MIB
        assert context(card, tiny(), INFER, Strategy(quant="int8", cache="offloaded")).typical == (
            plain + 148 * MIB
        )
        assert context(card, tiny(), train(), how()).typical == 758 * MIB
        assert context(card, tiny(), train(), how(quant="int8")).typical == 836 * MIB
        experts = context(card, routed, INFER, Strategy())
        assert experts.typical == plain and experts.high == 1118 * MIB

    def test_elsewhere_the_interval_is_wider(self) -> None:
        here, there = (context(load_gpu(name), tiny(), INFER, Strategy()) for name in ("h200", "rtx-3090"))
        assert not there.measured
        assert there.high - there.low > 5 * (here.high - here.low)
        assert there.low < here.low < here.high < there.high  # and says so on both sides


def card_memory(block: int, moment: str = "loss", total: int = 10 * 2**30, **changes) -> CardMemory:
    shot = snapshot(moment, [line("weights", total, "")], block)
    facts = {"load_bytes": total // 2, "load_peak_bytes": total // 2, "managed_bytes": 0, **changes}
    return CardMemory(snapshots=(shot,), **facts)


JOBS = [
    (INFER, Strategy(), "prefill"),
    (INFER, Strategy(quant="nf4"), "prefill"),
    (train("lora"), how(), "loss"),
    (train("qlora"), how(quant="nf4"), "backward"),
    (train("full"), how(optimizer="adamw_torch"), "loss"),
    (train("full"), how(optimizer="paged_adamw_8bit"), "loss"),
    (train("full"), how(gradient_checkpointing=False), "backward"),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("work", "strategy", "moment"), JOBS, ids=lambda item: getattr(item, "method", None))
def test_slack_is_ordered_and_grows_with_blocks(
    work: Workload, strategy: Strategy, moment: str, tied: bool
) -> None:
    arch = tiny(tie_word_embeddings=tied)
    found = [slack(card_memory(n * MIB, moment), arch, work, strategy) for n in (0, 16, 256, 1024)]
    for room in found:
        assert 0 <= room.low <= room.typical <= room.high
    assert [room.high for room in found] == sorted(room.high for room in found)
    assert [room.typical for room in found] == sorted(room.typical for room in found)


def test_slack_of_generation_stays_below_half_of_what_it_takes_beside_the_weights() -> None:
    card = card_memory(10**10, "prefill", total=10**9)
    room = slack(card, tiny(), INFER, Strategy())
    assert room.typical <= 0.12 * 10**9 and room.high <= 0.48 * (10**9 - card.load_bytes)


def test_states_that_settle_where_logits_were() -> None:
    work = train("full")
    resident = slack(card_memory(1024 * MIB), tiny(), work, how(optimizer="adamw_torch_fused"))
    paged = slack(card_memory(1024 * MIB), tiny(), work, how(optimizer="paged_adamw_8bit"))
    assert resident.typical > paged.typical


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "gemma-2-2b"])
def test_slack_stays_near_the_peak_of_real_jobs(name: str) -> None:
    arch = known(name)
    for work, strategy in ((train("full", seq_len=1024), how()), (train(seq_len=1024), how())):
        card = training_memory(arch, work, strategy, 0)
        assert slack(card, arch, work, strategy).high < 0.35 * card.peak.bytes
    card = inference_memory(arch, INFER, Strategy(), 0)
    assert slack(card, arch, INFER, Strategy()).high <= 0.2 * card.peak.bytes
