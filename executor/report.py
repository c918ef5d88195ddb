"""The report of a run: what was measured beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from executor.attempt import Outcome
from executor.files import write_atomically
from executor.predicted_lines import is_estimated
from planner.types import Candidate, Evaluation, ModelRef, Plan, RunReport, Speed, Workload


def make_report(
    plan: Plan,
    outcome: Outcome,
    skipped: tuple[str, ...],
    status: Literal["finished", "interrupted"] = "finished",
) -> RunReport:
    """The `fitwright.run/1` object of one run."""
    trained, generated, engine = outcome.trained, outcome.generated, outcome.engine
    report = RunReport(
        task=plan.workload.task,
        status=status,
        model=ModelRef(plan.model.id, plan.model.parameters),
        plan_digest=plan.digest,
        candidate=outcome.candidate.rank,
        skipped=skipped,
        engine=outcome.candidate.engine,
        device=str(outcome.device),
        strategy=outcome.candidate.strategy,
        workload=carried_out(plan.workload, outcome),
        layers_resident=engine["layers_resident"],
        layers_streamed=engine["layers_streamed"],
        layers_on_disk=engine["layers_on_disk"],
        slots=engine["slots"],
        bytes_streamed=engine["bytes_streamed"],
        link_bytes_per_s=engine["link_bytes_per_s"],
        disk_bytes_read=engine["disk_bytes_read"],
        disk_bytes_per_s=engine["disk_bytes_per_s"],
        load_bytes=outcome.load_bytes,
        allocated_peak_bytes=outcome.allocated_peak_bytes,
        reserved_peak_bytes=outcome.reserved_peak_bytes,
        process_peak_bytes=outcome.process_peak_bytes,
        context_bytes=outcome.context_bytes,
        managed_bytes=outcome.managed_bytes if outcome.load_bytes is not None else None,
        host_peak_bytes=outcome.host_peak_bytes,
        pinned_bytes=engine["pinned_bytes"],
        moments=outcome.moments,
        decode_tokens_per_s=generated.decode_tokens_per_s if generated else None,
        prefill_tokens_per_s=generated.prefill_tokens_per_s if generated else None,
        train_tokens_per_s=train_rate(outcome),
        speculation=generated.speculation if generated else None,
        steps=trained.steps if trained else None,
        resumed_from_step=trained.resumed_from_step if trained else 0,
        losses=tuple(trained.record.losses) if trained else (),
        step_seconds=tuple(round(each, 4) for each in trained.record.step_seconds) if trained else (),
        evaluations=tuple(Evaluation(*entry) for entry in trained.record.evaluations) if trained else (),
        components=_components(outcome),
        environment={**outcome.environment, "load_seconds": round(outcome.load_seconds, 3)},
        notes=tuple(outcome.notes),
    )
    notes = (*report.notes, *_why_no_prediction(outcome.candidate, report))
    return msgspec.structs.replace(report, notes=notes, error=errors(outcome.candidate, report))


def _components(outcome: Outcome) -> dict[str, int]:
    """Measured bytes by component: of the card where there is one, of the process elsewhere."""
    components: dict[str, int] = {}
    if outcome.trained is not None:
        components = dict(outcome.trained.components)
    elif outcome.generated is not None and outcome.load_bytes is not None:
        components = {"weights": outcome.load_bytes, "kv cache": outcome.generated.cache_bytes}
    if outcome.load_bytes is None and outcome.host_base_bytes and outcome.host_peak_bytes:
        base = outcome.host_base_bytes
        components = {"process": base, "run": outcome.host_peak_bytes - base, **components}
    return components


def _why_no_prediction(candidate: Candidate, report: RunReport) -> tuple[str, ...]:
    """A note where another engine or residency ran than the estimate is about."""
    if _is_estimated(candidate, report):
        return ()
    planned = f"engine {candidate.strategy.engine}"
    if candidate.strategy.engine == report.engine:
        planned += f" with {candidate.estimate.placement.layers_on_gpu} resident layers"
    return (f"no figure has a prediction: the plan's are for {planned}, and another way was asked for",)


def carried_out(planned: Workload, outcome: Outcome) -> Workload:
    """The job as it was done: batches of another size than planned, or another number of new tokens, make it
    another job than the one that was predicted."""
    generated = outcome.generated
    if generated is None:
        return planned
    done = msgspec.structs.replace(planned, new_tokens=generated.most_new_tokens)
    if generated.largest_batch not in (0, planned.sequences):
        done = msgspec.structs.replace(done, batch_size=generated.largest_batch, concurrency=1)
    return done


def train_rate(outcome: Outcome) -> float | None:
    """Tokens per second over the steps of this process but its first, in which kernels are loaded."""
    if outcome.trained is None:
        return None
    record = outcome.trained.record
    skip = 1 if len(record.step_seconds) > 1 else 0
    seconds = sum(record.step_seconds[skip:])
    return sum(record.step_tokens[skip:]) / seconds if seconds else None


def pairs(candidate: Candidate, report: RunReport) -> dict[str, tuple[float | None, float | None]]:
    """Predicted and measured of each figure that both sides can have; None where one does not know.

    What was predicted for the candidate's own engine and residency is no prediction for others, named on the
    command line.
    """
    own = _is_estimated(candidate, report)
    gpus = candidate.estimate.gpus
    gpu = gpus[0] if own and gpus and report.load_bytes is not None else None
    speed = candidate.speed if own else Speed()
    if report.speculation is not None:  # how many tokens a pass would give nobody predicts
        speed = msgspec.structs.replace(speed, decode_tokens_per_s=None)
    ram = candidate.estimate.host.ram_bytes if own else None
    return {
        "load_bytes": (gpu.load_bytes if gpu else None, report.load_bytes),
        "allocated_peak_bytes": (gpu.allocated_peak_bytes if gpu else None, report.allocated_peak_bytes),
        "context_bytes": (gpu.context_bytes if gpu else None, report.context_bytes),
        "process_bytes": (gpu.process_bytes if gpu else None, report.process_peak_bytes),
        "managed_bytes": (gpu.managed_bytes if gpu else None, report.managed_bytes),
        "ram_bytes": (ram or None, report.host_peak_bytes),
        "decode_tokens_per_s": (_typical(speed.decode_tokens_per_s), report.decode_tokens_per_s),
        "prefill_tokens_per_s": (_typical(speed.prefill_tokens_per_s), report.prefill_tokens_per_s),
        "train_tokens_per_s": (_typical(speed.train_tokens_per_s), report.train_tokens_per_s),
    }


def _is_estimated(candidate: Candidate, report: RunReport) -> bool:
    ran = msgspec.structs.replace(candidate, engine=report.engine)
    return is_estimated(ran, report.layers_resident)


def errors(candidate: Candidate, report: RunReport) -> dict[str, float]:
    """measured / predicted - 1 of each figure that was predicted and measured."""
    return {
        name: measured / predicted - 1
        for name, (predicted, measured) in pairs(candidate, report).items()
        if predicted and measured is not None
    }


def write_report(path: Path, report: RunReport) -> None:
    """`report.json`, whole or not at all."""
    write_atomically(path, to_json(report) + "\n")


def to_json(report: RunReport) -> str:
    """The report as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode()


def read_report(path: Path) -> RunReport:
    """A report written by `write_report`."""
    return msgspec.json.decode(path.read_bytes(), type=RunReport)


def _typical(speed: object) -> float | None:
    return getattr(speed, "typical", None)
