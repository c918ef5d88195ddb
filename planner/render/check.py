"""The screen of `planner check`: the page to look at before buying.

One target: a row for each job with everything about it. Several: a column for each card, so that they can be
compared. Verdicts are symbol and word, so nothing depends on colour.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.machine import budget
from planner.rank import LEAST_DECODE_TOKENS_PER_S
from planner.render import describe
from planner.render.catalogue import new_table, scaled
from planner.render.console import print_item
from planner.render.remarks import remarks
from planner.render.text import (
    STYLES,
    SYMBOLS,
    UNKNOWN,
    WORDS,
    gib,
    one_line,
    rate,
    size,
    tokens,
    with_interval,
)
from planner.render.text import verdict as text_verdict
from planner.survey import Answer, Survey, Target
from planner.types import GOOD, GpuEstimate, Range, Workload

_CARD_COLUMN = 22


def print_check(out: Console, survey: Survey, architecture: str) -> None:
    """Draw the whole page."""
    out.print(Text(one_line(describe.model(survey.model)), "bold"))
    out.print(architecture)
    if len(survey.targets) == 1:
        _print_one(out, survey.targets[0])
    else:
        _print_several(out, survey.targets)
    for number, line in enumerate(remarks(survey.targets)):
        if number == 0:
            out.print()
        print_item(out, line, "", indent=0)
    _print_smallest(out, survey)
    _print_streamed(out, survey)
    out.print()
    for line in (*assumptions(survey.workloads.values()), *_measurements(survey.targets)):
        print_item(out, line, "", indent=0)


def assumptions(workloads: Iterable[Workload]) -> list[str]:
    """What the numbers stand on, and how to read them."""
    lines = []
    for work in workloads:
        if work.task == "infer":
            users = f" x {work.concurrency} at once" if work.concurrency > 1 else ""
            asked = f"prompt {work.prompt_tokens} + {work.new_tokens} new tokens"
            lines.append(f"run: {asked}, batch {work.batch_size}{users}")
        else:
            lines.append(
                f"train: {work.seq_len} tokens, batch {work.batch_size}, LoRA r={work.lora_rank} "
                f"{work.lora_targets}"
            )
    return [
        "Assumes " + "; ".join(lines) + ".",
        "Card, RAM and disk in GiB (2^30 bytes); card: what must be free, with its 90 % interval. "
        "Context and batch: the most that still fits, the rest unchanged. "
        f"Slow: under {LEAST_DECODE_TOKENS_PER_S:g} tok/s.",
    ]


def _measurements(targets: tuple[Target, ...]) -> list[str]:
    """Where figures of the machine itself stand behind or beside the numbers."""
    found = []
    for target in targets:
        where = f" on {one_line(target.name, 40)}" if len(targets) > 1 else ""
        answers = [(answer, answer.estimate) for answer in target.answers if answer.estimate is not None]
        bases = {shown.speed.basis: None for _, shown in answers if describe.probed(shown.speed)}
        found += [f"Speeds{where}: {basis} of this machine." for basis in bases]
        found += [
            f"Measured here, {answer.label}{where}: {describe.measured(shown.measured_here)}."
            for answer, shown in answers
            if shown.measured_here is not None
        ]
    return found


# --------------------------------------------------------------------------- one target


def _print_one(out: Console, target: Target) -> None:
    on_card = bool(target.machine.gpus)
    gpus = target.machine.gpus
    if gpus:
        many = f"{len(gpus)} x " if len(gpus) > 1 else ""
        card = f"{many}{one_line(gpus[0].profile.name)}: {', '.join(_card_facts(target))}"
        print_item(out, card, "on ", indent=0)
    else:
        out.print("no GPU in sight: what one would need, and what the CPU can do")
    host = describe.host(target.machine)
    if host:
        out.print(f"with {host}")
    out.print()
    out.print(_needs_table(target) if on_card else _cardless_table(target))


def _needs_table(target: Target) -> Table:
    table = new_table("job", "card GiB (90 %)", "RAM", "disk", "verdict", "tok/s", "context", "batch")
    table.columns[0].min_width = 11
    table.columns[4].justify = "left"
    for answer in target.answers:
        gpu = _largest(answer)
        host = answer.estimate.host.ram_bytes if answer.estimate else None
        disk = answer.estimate.disk.bytes if answer.estimate else None
        table.add_row(
            answer.label,
            with_interval(gpu.process_bytes, gpu.low_bytes, gpu.high_bytes) if gpu else UNKNOWN,
            gib(host),
            gib(disk),
            verdict(answer),
            rate(typical(answer)) if answer.verdict != "does_not_fit" else UNKNOWN,
            tokens(answer.longest_context_tokens),
            tokens(answer.largest_batch_size),
        )
    return table


def _cardless_table(target: Target) -> Table:
    table = new_table("job", "any card GiB (90 %)", "disk", "RAM on CPU", "here on CPU", "tok/s")
    table.columns[4].justify = "left"
    for answer in target.answers:
        need = answer.need.gpus[0] if answer.need and answer.need.gpus else None
        table.add_row(
            answer.label,
            with_interval(need.process_bytes, need.low_bytes, need.high_bytes) if need else UNKNOWN,
            gib(answer.need.disk.bytes if answer.need else None),
            gib(answer.estimate.host.ram_bytes if answer.estimate else None),
            verdict(answer),
            rate(typical(answer)) if answer.verdict != "does_not_fit" else UNKNOWN,
        )
    return table


def verdict(answer: Answer) -> Text:
    """Symbol and word, and whether it takes RAM or disk to get there."""
    if answer.verdict == "not_possible":
        return Text("✗ no", "red")
    if answer.verdict not in GOOD:
        return Text(text_verdict(answer.verdict), STYLES[answer.verdict])
    placement = answer.strategy.placement if answer.strategy else "full_gpu"
    word = {"mixed_offload": "+RAM", "disk_offload": "+disk"}.get(placement, WORDS[answer.verdict])
    if answer.estimate and answer.estimate.placement.layers_on_disk:
        word = "+disk"
    speed = typical(answer)
    if speed is not None and speed < LEAST_DECODE_TOKENS_PER_S:
        return Text(f"~ {word if placement != 'cpu' else 'slow'}", STYLES["tight"])
    return Text(f"{SYMBOLS[answer.verdict]} {word}", STYLES[answer.verdict])


def typical(answer: Answer) -> float | None:
    """Typical speed of the shown way in tokens per second."""
    speed = _speed(answer)
    return speed.typical if speed else None


def _speed(answer: Answer) -> Range | None:
    if answer.estimate is None:
        return None
    speed = answer.estimate.speed
    return speed.train_tokens_per_s or speed.decode_tokens_per_s


def _largest(answer: Answer) -> GpuEstimate | None:
    gpus = answer.estimate.gpus if answer.estimate else ()
    return max(gpus, key=lambda gpu: gpu.process_bytes, default=None)


# --------------------------------------------------------------------------- several targets


def _print_several(out: Console, targets: tuple[Target, ...]) -> None:
    """Tables of as many cards as the width takes."""
    across = max(1, (out.width - 13) // _CARD_COLUMN)
    for start in range(0, len(targets), across):
        out.print()
        out.print(_side_by_side(targets[start : start + across]))


def _side_by_side(targets: tuple[Target, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for target in targets:
        table.add_column(one_line(target.name, 40), overflow="fold")
    columns = [_column(target) for target in targets]
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(cell for _, cell in row), end_section=row[0][0] == "launch")
    return table


def _column(target: Target) -> list[tuple[str, Text]]:
    """Name and cell of every row of one card."""
    gpus = target.machine.gpus
    gpu = gpus[0] if gpus else None
    profile = gpu.profile if gpu else None
    many = f" x {len(gpus)}" if len(gpus) > 1 else ""
    power = profile.power_watts if profile else None
    usable = gib(budget(gpu)[0]) if gpu else UNKNOWN
    rows = [
        ("usable", Text(f"{usable}{many} GiB" if gpu else "no card")),
        ("bandwidth", Text(f"{scaled(profile.bandwidth_bytes_per_s if profile else None, 10**9)} GB/s")),
        ("power", Text(f"{power * len(gpus)} W" if power else UNKNOWN)),
        ("launch", Text(describe.launch(profile) if profile else UNKNOWN)),
    ]
    return rows + [(answer.label, _cell(answer)) for answer in target.answers]


def _cell(answer: Answer) -> Text:
    """Verdict and speed, and below them the memory with the longest context."""
    first = verdict(answer)
    speed = typical(answer)
    if speed is not None and answer.verdict in GOOD:
        first.append(f", {rate(speed)} tok/s", "default")
    gpu = _largest(answer)
    second = size(gpu.process_bytes) if gpu else ""
    if answer.longest_context_tokens:
        second += f", up to {tokens(answer.longest_context_tokens)}"
    return Text.assemble(first, "\n", (second, "dim")) if second else first


def _card_facts(target: Target) -> list[str]:
    gpus = target.machine.gpus
    profile = gpus[0].profile
    each = " each" if len(gpus) > 1 else ""
    facts = [f"{gib(budget(gpus[0])[0])} of {gib(gpus[0].total_bytes)} GiB usable{each}"]
    if profile.bandwidth_bytes_per_s:
        facts.append(f"{scaled(profile.bandwidth_bytes_per_s, 10**9)} GB/s")
    if profile.power_watts:
        facts.append(f"{profile.power_watts * len(gpus)} W")
    if profile.launch_price_usd:
        facts.append(f"{describe.launch(profile)} at launch")
    return facts


# --------------------------------------------------------------------------- cards for each job


def _print_smallest(out: Console, survey: Survey) -> None:
    labels = {answer.job: answer.label for answer in survey.targets[0].answers}
    rows = [(labels[job], cards) for job, cards in survey.smallest_cards.items() if job in labels]
    if not rows:
        return
    out.print()
    table = new_table("job", "smallest cards that hold all of it")
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    for label, cards in rows:
        table.add_row(label, ", ".join(cards) if cards else "none of the catalogue")
    out.print(table)


def _print_streamed(out: Console, survey: Survey) -> None:
    labels = {answer.job: answer.label for answer in survey.targets[0].answers}
    if not survey.streamed:
        return
    out.print()
    table = new_table("job", "smallest cards it streams through", "card GiB", "RAM", "tok/s", left=2)
    for job, found in survey.streamed.items():
        for number, each in enumerate(found):
            sizes = (gib(each.card_bytes), gib(each.ram_bytes), rate(each.tokens_per_s))
            table.add_row("" if number else labels[job], each.card, *sizes)
    out.print(table)
