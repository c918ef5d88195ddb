"""`executor run` and `rehearse`: from plan.json to report.json."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from executor import ui
from executor.device import choose_device, require_packages
from executor.disk_errors import writing_failed
from executor.engines import find_engine
from executor.errors import BadOption, CannotHonour, DirectoryInUse, FitwrightError, Interrupted
from executor.inputs import Inputs, read_inputs
from executor.options import RunOptions
from executor.output import OutputDirectory
from executor.plan_file import candidates_to_try, load_plan
from executor.preflight import Now, clear
from executor.quiet import silence
from executor.source import find_weights, without_weights
from executor.stopping import StopRequest
from executor.surroundings import look
from planner.types import Candidate, Plan, RunReport

if TYPE_CHECKING:
    from executor.attempt import Outcome


DEFECT = "this is a defect of Fitwright or of a library it uses"


def run(options: RunOptions) -> int:
    """Carry a plan out; returns the exit code.

    Errors: subclasses of `FitwrightError` with their exit codes: 2 bad input or a disk that takes no more,
    3 out of memory on every candidate, 130 interrupted.
    """
    silence(options.debug)
    with StopRequest() as stop:
        try:
            return _run(options, stop)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", "the same command begins where its files end") from None


def _run(options: RunOptions, stop: StopRequest) -> int:
    plan = load_plan(options.plan)
    candidates = tuple(_override(c, options) for c in candidates_to_try(plan, options.candidate))
    find_engine(candidates[0].engine, options.resident_layers)
    if options.pack and candidates[0].engine != "stream":
        raise BadOption("--pack is for engine stream", "add --engine stream")
    if options.vram_cap_bytes is not None and candidates[0].strategy.placement == "cpu":
        raise CannotHonour("--vram-cap is for a candidate that runs on a card; this one runs on the CPU")
    inputs = read_inputs(plan.workload, options)
    output = OutputDirectory(_output_path(plan, options, inputs))
    status = output.open(plan.digest, _settings(options, inputs), options.restart)
    try:
        if status == "finished":
            report = _finished(output)
        else:
            report = _carry_out(plan, candidates, options, inputs, output, stop)
    except BaseException as error:
        output.sweep()
        output.forget_if_empty()
        shown = _as_shown(error, output, options)
        if shown is error:
            raise
        raise shown from error
    finally:
        output.close()
    _show(report, candidates_to_try(plan, report.candidate)[0], output, options)
    return 0


def _as_shown(error: BaseException, output: OutputDirectory, options: RunOptions) -> BaseException:
    """The error as one that can be told in a line."""
    if isinstance(error, FitwrightError) or not isinstance(error, Exception):
        return error
    failure = writing_failed(error, output.path, output.has_progress())
    if failure is not None or options.debug:
        return failure or error
    first = str(error).strip().split("\n")[0][:200]
    return FitwrightError(f"{DEFECT} ({type(error).__name__}: {first})", "--debug shows where")


def _carry_out(
    plan: Plan,
    candidates: tuple[Candidate, ...],
    options: RunOptions,
    inputs: Inputs,
    output: OutputDirectory,
    stop: StopRequest,
) -> RunReport:
    from executor.ladder import Job, first_that_runs

    candidates, left = _from_where_it_was(candidates, output)
    now = look(plan.model, output.path, options.rehearse)
    _require_card(candidates, now, plan, options)
    candidates, refused, warnings = clear(
        plan, candidates, now, options.vram_cap_bytes, options.rehearse, options.preflight
    )
    for line in (*refused, *(f"warning: {text}" for text in warnings)):
        ui.say(line)
    source = (
        without_weights(plan.model)
        if options.rehearse
        else find_weights(plan.model, options.offline, options.trust_remote_code)
    )
    _show_only_card(candidates)
    job = Job(plan=plan, options=options, inputs=inputs, source=source, output=output, stop=stop)
    outcome, skipped = first_that_runs(job, candidates, (*left, *refused))
    return _report(plan, outcome, skipped, now, options, output)


def _from_where_it_was(
    candidates: tuple[Candidate, ...], output: OutputDirectory
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """A resumed run begins with the candidate it had come to; those before it had been left."""
    reached, left = output.reached
    rest = tuple(c for c in candidates if c.rank >= reached)
    return (rest, left) if rest and reached else (candidates, ())


def _report(
    plan: Plan,
    outcome: Outcome,
    skipped: tuple[str, ...],
    now: Now,
    options: RunOptions,
    output: OutputDirectory,
) -> RunReport:
    from executor.ledger import remember
    from executor.report import make_report, write_report

    interrupted = outcome.trained is not None and outcome.trained.interrupted
    report = make_report(plan, outcome, skipped, "interrupted" if interrupted else "finished")
    write_report(output.report, report)
    if interrupted:
        raise Interrupted(f"interrupted after step {report.steps}", "the same command goes on from there")
    output.finish()
    remember(plan, outcome.candidate, report, now, options)
    return report


def _require_card(candidates: tuple[Candidate, ...], now: Now, plan: Plan, options: RunOptions) -> None:
    """Errors: `CannotHonour` where the first candidate is for a card and there is none. Else its memory would
    be compared with what is not there, and the run would end on a processor that nobody asked for."""
    first = candidates[0]
    if now.machine.gpus or first.strategy.placement == "cpu":
        return
    require_packages(first, plan.workload, options.report_to)
    _show_only_card(candidates)
    choose_device(first)  # torch may see a card that the driver's library does not


def _show_only_card(candidates: tuple[Candidate, ...]) -> None:
    """Let CUDA see just the card of a plan for one card, numbered as NVML and nvidia-smi do."""
    cards = {place for c in candidates for place in c.device_map.values() if isinstance(place, int)}
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if len(cards) == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(cards.pop())


def _override(candidate: Candidate, options: RunOptions) -> Candidate:
    if options.engine is None:
        return candidate
    return msgspec.structs.replace(candidate, engine=options.engine)


def _settings(options: RunOptions, inputs: Inputs) -> dict[str, Any]:
    return {**options.settings(), "input": inputs.digest}


def _output_path(plan: Plan, options: RunOptions, inputs: Inputs) -> Path:
    if options.output is not None:
        return options.output
    import hashlib
    import re

    model = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.id).strip(".-")[:60] or "model"
    job = plan.workload.method if plan.workload.task == "train" else "infer"
    key = msgspec.json.encode([plan.digest, _settings(options, inputs)])
    return Path("runs") / f"{model}-{job}-{hashlib.sha256(key).hexdigest()[:8]}"


def _finished(output: OutputDirectory) -> RunReport:
    from executor.report import read_report

    try:
        report = read_report(output.report)
    except (OSError, msgspec.MsgspecError):
        raise DirectoryInUse(
            f"cannot read the report of the finished run, {output.report}",
            "--restart begins again, or give another --output",
        ) from None
    ui.say(f"{output.path} holds this run, finished; --restart begins again")
    return report


def _show(report: RunReport, candidate: Candidate, output: OutputDirectory, options: RunOptions) -> None:
    if options.json:
        from executor.report import to_json

        print(to_json(report))
    else:
        from executor.table import show

        show(report, candidate, output.path)
