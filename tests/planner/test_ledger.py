"""The ledger: what counts as the same run, and what is shown beside an estimate that stays as it is."""

import random

import msgspec
import pytest
from inspect_fakes import FakeSystem
from msgspec.structs import replace

from planner.estimate import estimate, normal, normal_strategy
from planner.inspect import ledger as reading
from planner.inspect.ledger import read_ledger, recall
from planner.inspect.probes import read_probe
from planner.ledger import (
    Entry,
    Figures,
    accuracy,
    config_hash,
    errors,
    ledger_hash,
    line_of,
    machine_key,
    parse,
    remembering,
    with_measured,
)
from planner.machine import machine_from_gpus
from planner.plan import make_plan, plan_bytes
from planner.speed import predict_speed
from planner.types import Host, Machine, PlacementMap, Stack, Strategy, Workload
from planner.units import GIB
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

MODEL = load_model("qwen2.5-0.5b")
STACK = Stack("2.11", "5.17", "0.50", "0.21")
TRAIN = Workload(task="train", seq_len=512)
HOW = Strategy(quant="nf4", optimizer="paged_adamw_8bit")
PLAIN = machine_from_gpus([(load_gpu("rtx-3090"), 1)], ram_bytes=64 * GIB)
LIVE = replace(
    PLAIN, origin="live", gpus=(replace(PLAIN.gpus[0], uuid="GPU-1", driver="580.1", free_bytes=23 * GIB),)
)


def entry(**changes) -> Entry:
    plain = Entry(
        date="2026-03-01T10:00:00Z",
        kind="rehearsal",
        machine="GPU-1",
        device="RTX 3090",
        stack=STACK,
        model=MODEL.id,
        config_hash=config_hash(MODEL.config),
        workload=normal(TRAIN),
        strategy=normal_strategy(HOW, TRAIN),
        predicted=Figures(allocated_peak_bytes=100, train_tokens_per_s=50.0),
        measured=Figures(allocated_peak_bytes=110, train_tokens_per_s=45.0, managed_bytes=7),
    )
    return replace(plain, **changes)


def shown(*entries, machine=LIVE, work=TRAIN, how=HOW):
    return with_measured(estimate(MODEL, machine, work, how), entries, machine, work, how).measured_here


# --------------------------------------------------------------------------- lines


def test_a_line_is_one_line_and_reads_back():
    odd = entry(model="a\nb\u2028c", device='"')
    assert line_of(odd).count(b"\n") == 1 and line_of(odd) == line_of(
        msgspec.json.decode(line_of(odd), type=Entry)
    )
    assert parse([line_of(odd).decode()]) == ((odd,), 0)


def test_lines_that_are_none_are_counted_and_left_out():
    good = line_of(entry()).decode()
    other = good.replace("fitwright.ledger/1", "fitwright.ledger/2")
    assert parse([good, "", "{", other, "[" * 10**5, good]) == ((entry(), entry()), 3)


def test_the_hash_does_not_depend_on_order_and_changes_with_an_entry():
    entries = [entry(date=f"2026-03-0{day}T10:00:00Z") for day in range(1, 9)]
    shuffled = random.Random(1).sample(entries, len(entries))
    assert ledger_hash(entries) == ledger_hash(shuffled) != ledger_hash(entries[1:])
    assert ledger_hash(()) is None


def test_the_models_hash_is_the_plans():
    plan = make_plan(MODEL, PLAIN, Workload())
    assert plan.model.config_hash == config_hash(MODEL.config)


# --------------------------------------------------------------------------- keys


def test_a_machine_is_told_by_uuid_else_by_name_and_driver():
    gpu = LIVE.gpus[0]
    assert machine_key(LIVE, (0,)) == "GPU-1"
    nameless = replace(LIVE, gpus=(replace(gpu, uuid=None),))
    assert machine_key(nameless, (0,)) == f"{gpu.profile.name}, driver 580.1"
    two = replace(LIVE, gpus=(gpu, replace(gpu, index=1, uuid="GPU-2")))
    assert machine_key(two, (0, 1)) == "GPU-1 + GPU-2"
    # a card of the catalogue is no machine, nor one the machine does not have
    assert machine_key(PLAIN, (0,)) is None and machine_key(LIVE, (3,)) is None


def test_a_machine_without_card_is_told_by_its_processor():
    assert machine_key(Machine(host=Host(cpu="A", cores=8)), ()) == "A x 8"
    assert machine_key(Machine(host=Host(cores=8)), ()) is None


# --------------------------------------------------------------------------- beside an estimate


def test_the_same_run_is_shown_and_the_estimate_stays_as_it_was():
    plain = estimate(MODEL, LIVE, TRAIN, HOW)
    beside = with_measured(plain, [entry()], LIVE, TRAIN, HOW)
    here = beside.measured_here
    assert (here.runs, here.last, here.allocated_peak_bytes) == (1, "2026-03-01", 110)
    assert here.train_tokens_per_s == 45.0 and here.load_bytes is None
    assert replace(beside, measured_here=None) == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "GPU-2"},
        {"workload": normal(replace(TRAIN, seq_len=1024))},
        {"workload": normal(replace(TRAIN, lora_rank=16))},
        {"strategy": replace(normal_strategy(HOW, TRAIN), loss="fused")},
        {"strategy": replace(normal_strategy(HOW, TRAIN), engine="stream")},
    ],
)
def test_another_machine_job_or_strategy_is_not_shown(changes):
    assert shown(entry(**changes)) is None
    assert shown(entry(**changes), entry()).runs == 1


def test_what_the_task_does_not_use_makes_no_difference():
    work = replace(TRAIN, prompt_tokens=7, train_tokens=10**6)
    assert shown(entry(), work=work, how=replace(HOW, cache="static")) is not None


def test_a_card_of_the_catalogue_has_measured_nothing():
    assert shown(entry(), machine=PLAIN) is None


def test_medians_over_runs_and_rehearsals_before_runs():
    def with_peak(peak, **more):
        return entry(measured=Figures(allocated_peak_bytes=peak), **more)

    runs = [with_peak(peak, kind="run") for peak in (5, 100, 7)]
    assert (shown(*runs).allocated_peak_bytes, shown(*runs).runs, shown(*runs).kind) == (7, 3, "run")
    both = shown(*runs, with_peak(50), with_peak(60, date="2026-04-02T00:00:00Z"))
    assert (both.allocated_peak_bytes, both.runs, both.kind, both.last) == (50, 2, "rehearsal", "2026-04-02")


def test_speed_under_a_cap_with_managed_memory_is_not_representative():
    capped = entry(vram_cap_bytes=8 * GIB)
    assert (shown(capped).train_tokens_per_s, shown(capped).allocated_peak_bytes) == (None, 110)
    without = entry(vram_cap_bytes=8 * GIB, measured=Figures(train_tokens_per_s=45.0))
    assert shown(without).train_tokens_per_s == 45.0


# --------------------------------------------------------------------------- plans


def plan_with(*entries):
    asking = remembering(estimate, entries)
    return make_plan(MODEL, LIVE, TRAIN, ledger_hash=ledger_hash(entries), estimator=asking)


def test_a_plan_names_the_ledger_it_used_and_stays_the_same_for_the_same():
    how = plan_with().candidates[0].strategy
    known = entry(strategy=normal_strategy(how, TRAIN))
    first, again = plan_with(known), plan_with(known)
    assert plan_bytes(first) == plan_bytes(again)
    assert first.ledger_hash == ledger_hash([known]) and first.candidates[0].estimate.measured_here.runs == 1
    assert plan_with().ledger_hash is None
    assert [replace(c.estimate, measured_here=None) for c in first.candidates] == [
        c.estimate for c in plan_with().candidates
    ]


# --------------------------------------------------------------------------- how good predictions were


def test_errors_and_accuracy():
    assert errors(entry()) == {"allocated_peak_bytes": 110 / 100 - 1, "train_tokens_per_s": 45 / 50 - 1}
    low = entry(measured=Figures(allocated_peak_bytes=70))
    found = accuracy([entry(), low, entry()])
    assert found["allocated_peak_bytes"].runs == 3
    assert found["allocated_peak_bytes"].median_error == pytest.approx(0.1)
    assert found["allocated_peak_bytes"].worst_error == pytest.approx(-0.3)
    assert found["train_tokens_per_s"].runs == 2 and "ram_bytes" not in found


def test_what_was_not_predicted_has_no_error():
    assert errors(entry(predicted=Figures())) == {} and accuracy([entry(predicted=Figures())]) == {}


# --------------------------------------------------------------------------- the file


def system(*lines: bytes) -> FakeSystem:
    text = b"".join(lines).decode()
    return FakeSystem({"/data/ledger.jsonl": text}, environment={"FITWRIGHT_HOME": "/data"})


def test_a_torn_last_line_is_left_out_and_not_complained_about():
    whole = line_of(entry())
    assert read_ledger(system(whole, whole[:-20])) == ((entry(),), 0)
    assert read_ledger(system(whole, whole[:-20], b"\n", whole)) == ((entry(), entry()), 1)
    assert read_ledger(FakeSystem(environment={"FITWRIGHT_HOME": "/data"})) == ((), 0)
    assert read_ledger(FakeSystem()) == ((), 0)


def test_only_runs_of_this_model_machine_and_stack_are_recalled(monkeypatch):
    monkeypatch.setattr(reading, "_installed", lambda: STACK)
    others = [
        entry(config_hash="0" * 64),
        entry(machine="GPU-9"),
        entry(stack=Stack("2.10", "5.17", "0.50", "0.21")),
    ]
    there = system(*map(line_of, [*others, entry()]))
    assert recall(MODEL.config, LIVE, there) == (entry(),)
    assert recall(load_model("qwen2.5-7b").config, LIVE, there) == ()


# --------------------------------------------------------------------------- the probe


def test_a_probe_of_this_driver_is_found_and_named_as_basis():
    text = (
        '{"schema":"fitwright.probe/1","card":"x","date":"2026-02-03","driver":"580.1",'
        '"device_bandwidth_bytes_per_s":500000000000,"uuid":"GPU-1"}'
    )
    there = FakeSystem({"/data/probes/GPU-1.json": text}, environment={"FITWRIGHT_HOME": "/data"})
    notes: list[str] = []
    probe = read_probe(there, LIVE.gpus, notes)
    probed = replace(LIVE, probe=probe)
    arch = architecture(MODEL.config)
    here = PlacementMap(layers_on_gpu=arch.layers)
    with_it, without = (
        predict_speed(arch, m, Workload(), Strategy(cache="static"), here) for m in (probed, LIVE)
    )
    assert with_it.basis == "probe of 2026-02-03" and not notes
    assert with_it.decode_tokens_per_s.low < without.decode_tokens_per_s.low
    other = (replace(LIVE.gpus[0], driver="590.0"),)
    assert read_probe(there, other, notes) is None and "another driver" in notes[0]
