"""What the table of `check` cannot hold: changes that make a job fit, refusals, notes; alike ones joined."""

from __future__ import annotations

from collections.abc import Sequence

from planner.survey import Target


def remarks(targets: Sequence[Target]) -> list[str]:
    """One sentence for each thing to say, with the jobs and cards it is about unless that is all."""
    about: dict[str, list[tuple[str, str]]] = {}
    for target in targets:
        for answer in target.answers:
            for text in (answer.reason, *answer.notes):
                if text:
                    about.setdefault(text, []).append((target.name, answer.label))
    everything = [(target.name, answer.label) for target in targets for answer in target.answers]
    return [_sentence(text, places, everything) for text, places in about.items()]


def _sentence(text: str, places: list[tuple[str, str]], everything: list[tuple[str, str]]) -> str:
    cards, jobs = _distinct(places, 0), _distinct(places, 1)
    all_cards, all_jobs = _distinct(everything, 0), _distinct(everything, 1)
    whole = len(places) == len(cards) * len(jobs)
    if not whole:
        return "; ".join(f"{job} on {card}" for card, job in places) + f": {text}"
    where = [", ".join(jobs)] if jobs != all_jobs else []
    if cards != all_cards:
        where.append(f"on {', '.join(cards)}")
    return f"{' '.join(where)}: {text}" if where else text


def _distinct(places: list[tuple[str, str]], part: int) -> list[str]:
    return list(dict.fromkeys(place[part] for place in places))
