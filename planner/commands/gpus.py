"""`planner gpus [TEXT]`: the cards of the catalogue."""

from __future__ import annotations

from argparse import Namespace

from msgspec import structs

from planner.render.output import matches, note, print_json
from profiles.hardware import all_gpus


def run(args: Namespace) -> int:
    """List the cards whose id, name or alias has every word of the text."""
    found = [card for card in all_gpus() if matches(args.text, (card.id, card.name, *card.aliases))]
    if not found:
        note(f"no card of the catalogue has {args.text!r} in its name")
    if args.json:
        print_json([structs.asdict(card) for card in found])
    elif found:
        from planner.render.catalogue import GPUS_NOTE, gpus_table
        from planner.render.console import make_console

        make_console().print(gpus_table(found), "", GPUS_NOTE, sep="\n")
    return 0
