"""Memory of a draft model beside the model it drafts for.

The two take turns: while the draft model computes, the other one keeps its weights and its cache, and the
other way round (`executor/speculation/draft_model.py`).
"""

from __future__ import annotations

from msgspec.structs import replace

from planner.memory.infer import inference_memory
from planner.memory.moments import CardMemory, Snapshot, line
from planner.types import MemoryLine, Strategy, Workload
from profiles.schema import Architecture

_PASSING = ("layer in work", "kv copy", "activations", "logits")
"""Lines of the model's decode that are not there while the draft model computes."""


def with_draft(memory: CardMemory, draft: Architecture, work: Workload, how: Strategy) -> CardMemory:
    """The run with `draft` whole on the card, in the dtype and precision of the model."""
    alone = inference_memory(draft, work, replace(how, speculate="none", draft=None, cache="dynamic"), 0)
    weights = line("draft model", alone.load_bytes, f"{draft.layers} layers + embeddings + head, {how.quant}")
    cache = max((_bytes(shot, "kv cache") for shot in alone.snapshots), default=0)
    kept = line("draft cache", cache, f"dynamic: {work.prompt_tokens} + {work.new_tokens} tokens")
    shots = [
        replace(shot, lines=(*shot.lines, weights, *((kept,) if shot.moment == "decode" else ())))
        for shot in memory.snapshots
    ]
    held = tuple(item for item in _decode(memory).lines if item.name not in _PASSING)
    for shot in alone.snapshots:
        own = (_renamed(item) for item in shot.lines if item.name != "library workspace")
        shots.append(Snapshot("decode", (*held, *own), shot.largest_block))
    return replace(
        memory,
        load_bytes=memory.load_bytes + alone.load_bytes,
        load_peak_bytes=max(memory.load_peak_bytes, memory.load_bytes + alone.load_peak_bytes),
        snapshots=tuple(shots),
    )


def _decode(memory: CardMemory) -> Snapshot:
    return max((shot for shot in memory.snapshots if shot.moment == "decode"), key=lambda shot: shot.bytes)


def _bytes(shot: Snapshot, name: str) -> int:
    return sum(item.bytes for item in shot.lines if item.name == name)


def _renamed(item: MemoryLine) -> MemoryLine:
    names = {"weights": "draft model", "kv cache": "draft cache"}
    return replace(item, name=names.get(item.name, f"draft {item.name}"))
