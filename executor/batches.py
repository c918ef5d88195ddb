"""Examples into batches: padding, a held-out part, and random tokens for rehearsing."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    rounding. With `flat`, packed sequences are joined into one, unpadded: flash attention tells rows apart by
    positions in a batch of one only.
    """

    def __init__(self, pad_token_id: int, multiple: int, seq_len: int, flat: bool = False) -> None:
        self._pad, self._multiple, self._seq_len, self._flat = pad_token_id, multiple, seq_len, flat

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        if self._flat and "position_ids" in items[0]:
            joined = {name: [token for item in items for token in item[name]] for name in items[0]}
            return {name: torch.tensor([values]) for name, values in joined.items()}
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


def count_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a batch that are not padding, as a tensor on its device."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    if "position_ids" not in batch:
        return batch["input_ids"].new_tensor(batch["input_ids"].numel())
    # padding has position 0, and so has the first token of each row, which a token of position 1 follows
    positions = batch["position_ids"]
    return (positions > 0).sum() + (positions == 1).sum()


def split(examples: Sequence[Example], part: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training examples and held-out ones, drawn with `seed`; at least one of each where `part` > 0."""
    if part <= 0 or len(examples) < 2:
        return list(examples), []
    held = max(1, min(len(examples) - 1, round(len(examples) * part)))
    chosen = set(random.Random(seed).sample(range(len(examples)), held))
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [e for i, e in enumerate(examples) if i in chosen]
