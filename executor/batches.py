"""Examples into batches: padding, packing, a held-out part, and random tokens for rehearsing."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from executor.examples import IGNORED, Example

if TYPE_CHECKING:
    import torch


class Examples:
    """A map-style dataset of tokenized examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self._examples[index]
        item = {"input_ids": example.input_ids, "labels": example.labels}
        return {**item, "position_ids": example.position_ids} if example.position_ids else item


class RandomTokens:
    """`count` sequences of exactly `seq_len` random tokens, all learned; the same for the same seed."""

    def __init__(self, count: int, seq_len: int, vocab_size: int, seed: int) -> None:
        self._count, self._seq_len, self._vocab_size, self._seed = count, seq_len, vocab_size, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens = random.Random(self._seed * 1_000_003 + index).choices(
            range(self._vocab_size), k=self._seq_len
        )
        return {"input_ids": tokens, "labels": tokens}


class Collator:
    """Pads a batch on the right to its longest sequence, rounded up. Shapes of the result: batch x length.

    Every new length costs the matrix libraries a new choice of kernel (on the CPU a compilation), hence the
    rounding.
    """

    def __init__(self, pad_token_id: int, multiple: int, seq_len: int) -> None:
        self._pad, self._multiple, self._seq_len = pad_token_id, multiple, seq_len

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(item["input_ids"]) for item in items)
        longest = min(-(-longest // self._multiple) * self._multiple, max(longest, self._seq_len))

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([item[name] + [filler] * (longest - len(item[name])) for item in items])

        batch = {"input_ids": padded("input_ids", self._pad), "labels": padded("labels", IGNORED)}
        if "position_ids" in items[0]:
            # positions that start again tell transformers where one row ends; a mask would hide that
            batch["position_ids"] = padded("position_ids", 0)
        else:
            lengths = torch.tensor([len(item["input_ids"]) for item in items])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


def pack(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Several examples in one sequence: longest first, each where least room is left (best-fit decreasing).

    Positions start again at 0 with each example, from which transformers makes a mask that keeps them apart.
    """
    packed: list[Example] = []
    room: list[tuple[int, int]] = []  # (tokens left, index in packed), sorted
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, index = room.pop(at)
        else:
            left, index = seq_len, len(packed)
            packed.append(Example([], []))
        home = packed[index]
        home.input_ids += example.input_ids
        home.labels += [IGNORED, *example.labels[1:]]
        home.position_ids += range(size)
        bisect.insort(room, (left - size, index))
    return packed


def split(examples: Sequence[Example], part: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training examples and held-out ones, drawn with `seed`; at least one of each where `part` > 0."""
    if part <= 0 or len(examples) < 2:
        return list(examples), []
    held = max(1, min(len(examples) - 1, round(len(examples) * part)))
    chosen = set(random.Random(seed).sample(range(len(examples)), held))
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [e for i, e in enumerate(examples) if i in chosen]
