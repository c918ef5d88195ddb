"""The screen of `planner plan`: candidates best first with their reasons, then what lost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.render import describe
from planner.render.catalogue import new_table
from planner.render.console import print_item
from planner.render.text import STYLES, UNKNOWN, gib, one_line, parameters, rate, verdict, with_interval
from planner.types import Candidate, Plan, Rejected


def print_plan(out: Console, plan: Plan) -> None:
    """Draw the whole screen."""
    out.print(Text(f"{one_line(plan.model.id)} · {parameters(plan.model.parameters)} parameters", "bold"))
    out.print(describe.job(plan.workload))
    out.print(f"on {describe.machine(plan.machine)}; {plan.prefer} first")
    out.print()
    if plan.candidates:
        out.print(_candidates(plan))
        speed = plan.candidates[0].speed
        if describe.probed(speed):
            out.print(f"speeds from the {speed.basis} of this machine")
        for candidate in plan.candidates:
            _print_reasons(out, plan, candidate)
    else:
        out.print(Text("nothing fits", STYLES["does_not_fit"]))
    if plan.rejected:
        out.print()
        out.print(_rejected(plan.rejected))


def _candidates(plan: Plan) -> Table:
    table = new_table(
        "", "weights", "placement", "card GiB (90 %)", "RAM", "disk", "verdict", "tok/s", left=3
    )
    for candidate in plan.candidates:
        estimate, how = candidate.estimate, candidate.strategy
        gpu = max(estimate.gpus, key=lambda gpu: gpu.process_bytes, default=None)
        speed = candidate.speed.train_tokens_per_s or candidate.speed.decode_tokens_per_s
        table.add_row(
            str(candidate.rank),
            describe.weights(how),
            describe.placement(how, estimate.placement),
            with_interval(gpu.process_bytes, gpu.low_bytes, gpu.high_bytes) if gpu else UNKNOWN,
            gib(estimate.host.ram_bytes),
            gib(estimate.disk.bytes),
            Text(verdict(estimate.verdict), STYLES[estimate.verdict]),
            rate(speed.typical if speed else None),
        )
    return table


def _print_reasons(out: Console, plan: Plan, candidate: Candidate) -> None:
    out.print()
    print_item(out, describe.strategy(candidate.strategy, plan.workload), f"{candidate.rank}. ", indent=0)
    for reason in candidate.reasons:
        print_item(out, reason, indent=3)
    if candidate.estimate.measured_here is not None:
        print_item(out, f"measured here: {describe.measured(candidate.estimate.measured_here)}", indent=3)


def _rejected(rejected: tuple[Rejected, ...]) -> Table:
    table = new_table("passed over", "why, and what would do", left=2)
    table.columns[0].no_wrap = True
    alike: dict[str, list[str]] = {}
    for each in rejected:
        how = each.strategy
        why = each.reason + (f"; would do: {each.needs}" if each.needs else "")
        alike.setdefault(why, []).append(f"{describe.weights(how)}, {describe.PLACEMENTS[how.placement]}")
    for why, names in alike.items():
        table.add_row("\n".join(dict.fromkeys(names)), why)
    return table
