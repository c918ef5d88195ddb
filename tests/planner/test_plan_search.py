"""From a job to a plan: what is offered, what is rejected, and what would make it fit."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_fakes import LLAMA_70B, QWEN_7B, QWEN_14B, STACK, card, estimate, no_card, profile

from planner.errors import BadOption
from planner.machine import machine_from_gpus
from planner.plan import digest_of, make_plan, plan_bytes
from planner.rank import footprint
from planner.search import MOST_CANDIDATES, search
from planner.types import Plan, Workload
from planner.units import GIB

MODEL = profile(QWEN_7B)
INFER = Workload()
JOBS = [
    INFER,
    Workload(batch_size=32, prompt_tokens=4000),
    *(Workload(task="train", method=method) for method in ("qlora", "lora", "full")),
]


def plan_for(machine, workload=INFER, config=QWEN_7B, **options) -> Plan:
    return make_plan(profile(config), machine, workload, estimator=estimate, **options)


def test_the_first_candidate_keeps_the_most_quality_that_fits_and_is_usable():
    best = plan_for(card("rtx-3090", 1, 64, 8)).candidates[0]
    assert (best.strategy.placement, best.strategy.quant, best.rank) == ("full_gpu", "none", 1)
    # 28 GiB of weights do not fit on 24, and with some of them in RAM it is too slow.
    best = plan_for(card("rtx-3090", 1, 64, 8), config=QWEN_14B).candidates[0]
    assert (best.strategy.placement, best.strategy.quant) == ("full_gpu", "int8")


def test_prefer_changes_the_first_candidate():
    machine = card("rtx-3090", 1, 64, 8)
    by_headroom = plan_for(machine, prefer="headroom").candidates[0]
    assert by_headroom.strategy.quant == "nf4"


@pytest.mark.parametrize("workload", JOBS, ids=lambda job: f"{job.task}-{job.method}-{job.batch_size}")
@pytest.mark.parametrize(
    "machine",
    [card("rtx-3090", 1, 64, 8), card("t4"), card("rtx-3090", 2), card("h200", 1, 512, 64), no_card(256)],
    ids=["3090", "t4", "2x3090", "h200", "cpu"],
)
def test_every_plan_is_in_order_and_accounts_for_every_way(machine, workload):
    plan = plan_for(machine, workload)
    assert [each.rank for each in plan.candidates] == list(range(1, len(plan.candidates) + 1))
    assert len(plan.candidates) <= MOST_CANDIDATES
    for each in plan.candidates:
        assert each.estimate.verdict in ("fits", "tight")
        assert each.reasons and each.engine == each.strategy.engine
    offered = {each.strategy for each in plan.candidates}
    assert len(offered) == len(plan.candidates)
    for each in plan.rejected:
        assert each.strategy not in offered and each.reason
    assert plan.candidates or all(each.needs for each in plan.rejected)
    assert {each.strategy.placement for each in (*plan.candidates, *plan.rejected)} >= (
        {"full_gpu", "mixed_offload", "disk_offload", "cpu"} if machine.gpus else {"cpu"}
    )


def test_a_later_candidate_is_another_placement_or_needs_less_or_is_faster():
    for method in ("full", "lora", "qlora"):
        plan = plan_for(card("h200", 1, 512, 64), Workload(task="train", method=method))
        before = []
        for each in plan.candidates:
            alike = [b for b in before if b.strategy.placement == each.strategy.placement]
            needed, speed = footprint(each.estimate), each.speed.train_tokens_per_s.typical
            assert (
                not alike
                or all(needed < footprint(b.estimate) for b in alike)
                or all(speed > b.speed.train_tokens_per_s.typical for b in alike)
            )
            before.append(each)
        assert len(plan.candidates) > 1


def test_nothing_is_offloaded_where_everything_fits():
    plan = plan_for(card("h200", 1, 512, 64))
    rejected = {each.strategy.placement: each.reason for each in plan.rejected}
    assert "every layer fits" in rejected["mixed_offload"] and "every layer fits" in rejected["disk_offload"]


def test_a_plan_without_candidates_says_what_would_fit():
    plan = plan_for(card("rtx-3060-12gb"), Workload(task="train", method="full", seq_len=1024))
    assert plan.candidates == ()
    on_card = next(each for each in plan.rejected if each.strategy.placement == "full_gpu")
    assert "needs" in on_card.reason and on_card.process_bytes
    # A larger card, or the method that does fit.
    assert "a card with" in on_card.needs and "--method qlora" in on_card.needs


def test_a_shorter_sequence_or_a_smaller_batch_is_offered_when_it_would_do():
    plan = plan_for(card("rtx-3060-12gb"), Workload(task="train", batch_size=16, seq_len=4096))
    needs = next(each.needs for each in plan.rejected if each.strategy.quant == "nf4" and each.process_bytes)
    batch = int(needs.split("--batch-size ")[1].split(";")[0])
    tokens = int(needs.split("--seq-len ")[1].split(";")[0])
    assert plan_for(card("rtx-3060-12gb"), Workload(task="train", batch_size=batch, seq_len=4096)).candidates
    assert plan_for(card("rtx-3060-12gb"), Workload(task="train", batch_size=16, seq_len=tokens)).candidates
    assert batch < 16 and tokens < 4096


def test_the_card_that_is_asked_for_would_do():
    plan = plan_for(card("rtx-3060-12gb"), config=LLAMA_70B)
    for each in plan.rejected:
        if (
            each.process_bytes
            and each.strategy.placement == "full_gpu"
            and "a card with" in (each.needs or "")
        ):
            gib = int(each.needs.split("a card with ")[1].split()[0])
            larger = machine_from_gpus([], vram_bytes=gib * GIB)
            fixed = {"quant": each.strategy.quant, "placement": "full_gpu"}
            assert plan_for(larger, config=LLAMA_70B, pinned=fixed).candidates


def test_without_ram_known_the_cpu_is_no_candidate_unless_asked_for():
    plan = plan_for(card("rtx-3090"))
    assert all(each.strategy.placement != "cpu" for each in plan.candidates)
    cpu = [each for each in plan.rejected if each.strategy.placement == "cpu"]
    assert cpu and all("--ram" in each.needs for each in cpu)


def test_a_machine_without_card_gets_cpu_candidates():
    plan = plan_for(no_card(32), Workload(task="train"))
    assert plan.candidates[0].strategy.placement == "cpu" and plan.candidates[0].strategy.quant == "nf4"
    assert plan.candidates[0].estimate.gpus == ()


def test_only_the_named_method_is_planned():
    for method in ("full", "lora", "qlora"):
        plan = plan_for(card("h200", 1, 512, 64), Workload(task="train", method=method))
        assert plan.workload.method == method
        quants = {each.strategy.quant for each in plan.candidates}
        allowed = {"full": {"none"}, "lora": {"none", "int8"}, "qlora": {"nf4", "int8"}}[method]
        assert quants <= allowed and quants
    # NF4 under the adapters is as good as int8, and faster.
    assert plan.candidates[0].strategy.quant == "nf4"


def test_what_is_fixed_is_in_every_candidate():
    plan = plan_for(card("h200", 1, 512, 64), pinned={"quant": "int8", "placement": "full_gpu"})
    assert {(c.strategy.quant, c.strategy.placement) for c in plan.candidates} == {("int8", "full_gpu")}
    with pytest.raises(BadOption):
        plan_for(card("h200"), Workload(task="train", method="full"), pinned={"quant": "nf4"})


def test_a_plan_names_its_model_as_the_user_did():
    plan = plan_for(card("h200"), repo_id="Some/Repo", revision="abc", path="models/here")
    assert (plan.model.repo_id, plan.model.revision, plan.model.path) == ("Some/Repo", "abc", "models/here")
    assert plan.model.config == QWEN_7B and len(plan.model.config_hash) == 64
    assert plan.stack == STACK
    other = plan_for(card("h200"), config=QWEN_14B)
    assert other.model.config_hash != plan.model.config_hash


@settings(max_examples=25, deadline=None)
@given(
    gpu=st.sampled_from(["rtx-3090", "t4", "rtx-3060-12gb", "h200", "rx-7900-xtx", "apple-m3-max-128gb"]),
    job=st.sampled_from(JOBS),
    prefer=st.sampled_from(["quality", "speed", "headroom"]),
    ram=st.one_of(st.none(), st.integers(1, 512)),
)
def test_same_inputs_same_bytes(gpu, job, prefer, ram):
    machine = card(gpu, 1, ram, 8)
    first, second = (plan_for(machine, job, prefer=prefer) for _ in range(2))
    assert plan_bytes(first) == plan_bytes(second)
    assert first.digest == digest_of(msgspec.to_builtins(first))


@settings(max_examples=60, deadline=None)
@given(
    gib=st.integers(1, 200),
    more=st.integers(0, 200),
    job=st.sampled_from(JOBS),
)
def test_more_card_memory_never_takes_a_way_that_fits(gib, more, job):
    def fitting(size):
        machine = machine_from_gpus([], vram_bytes=size * GIB, ram_bytes=64 * GIB)
        found = search(MODEL, machine, job, pinned={"placement": "full_gpu"}, estimator=estimate)
        # a way that is tight is passed over beside another one that has come to fit: it still runs
        ways = {r.strategy.quant: "tight" for r in found.rejected if r.reason.startswith("tight, but beside")}
        return ways | {c.strategy.quant: c.estimate.verdict for c in found.candidates}

    small, large = fitting(gib), fitting(gib + more)
    for quant, verdict in small.items():
        assert quant in large
        if verdict == "fits":
            assert large[quant] == "fits"
