"""Seeded random weights in a model's real shapes, made tensor by tensor where they are needed.

The loader of transformers takes a state dict and asks every entry for its data only when its turn comes, as
it does with a safetensors file. A `LazyTensor` answers by drawing the values on the target device, so a
model larger than RAM goes through the same loading, quantizing and placing code as a real checkpoint and
nothing is written to disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NAMES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.float64": "F64",
          "torch.int64": "I64", "torch.int32": "I32", "torch.uint8": "U8", "torch.bool": "BOOL"}  # fmt: skip


class LazyTensor:
    """Looks to the loader like an unread slice of a safetensors file."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any, seed: int, std: float
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._device, self._std, self._given = device, std, seed
        # each tensor has its own seed, so values do not depend on the order or the threads of loading
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._seed = int.from_bytes(digest[:7], "big")

    def get_shape(self) -> list[int]:
        """As safetensors names it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return _NAMES[str(self.dtype)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self._device)[index]
        made = torch.empty(self.shape, dtype=self.dtype, device=self._device)
        leaf = self.name.rsplit(".", 1)[-1]
        if leaf == "bias":
            made.zero_()
        elif len(self.shape) == 1:
            made.fill_(1.0)
        else:
            generator = torch.Generator(self._device).manual_seed(self._seed)
            made.normal_(0.0, self._std, generator=generator)
        return made[index]

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tensor itself, moved or cast."""
        return self[...].to(*args, **kwargs)


class LazyStack(LazyTensor):
    """A stack of experts that is never whole: it passes through the loader unread, to be packed."""

    def __getitem__(self, index: Any) -> Any:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Drawn where and as it is needed already."""
        return self

    def experts(self) -> Iterator[torch.Tensor]:
        """The weight of each expert, drawn when its turn comes."""
        for expert in range(self.shape[0]):
            name = f"{expert}.{self.name}"
            yield LazyTensor(name, self.shape[1:], self.dtype, self._device, self._given, self._std)[...]


def lazy_state_dict(
    config: Any, dtype: torch.dtype, device: Any, seed: int, attention: str, pack_experts: bool = False
) -> tuple[type[Any], dict[str, LazyTensor]]:
    """The class of the model that `config` describes, and one lazy entry per weight of it, tied weights once.

    Values: norms 1, biases 0, everything else normal with the config's initializer_range. `pack_experts`:
    the loader packs stacks of experts, so they are drawn expert by expert.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    std = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    tied = _tied_names(skeleton, config)
    stacks = _stacks(skeleton) if pack_experts else set()
    return type(skeleton), {
        name: (LazyStack if name in stacks else LazyTensor)(
            name, tuple(tensor.shape), tensor.dtype, device, seed, std
        )
        for name, tensor in skeleton.state_dict().items()
        if name not in tied
    }


def _stacks(skeleton: Any) -> set[str]:
    from executor.packed_experts import adopt_experts, is_stack

    adopt_experts(skeleton)
    return {name for name, _ in skeleton.named_parameters() if is_stack(skeleton, name)}


def _tied_names(skeleton: Any, config: Any) -> set[str]:
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return set()
    known = getattr(skeleton, "all_tied_weights_keys", None)
    return set(known) if known else set()
