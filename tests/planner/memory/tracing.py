"""Bytes a real transformers module holds, counted storage by storage on the CPU, and what the tape predicts.

A dispatch mode sees every tensor torch makes; a finalizer on its storage sees it go. Sizes are rounded as the
CUDA allocator rounds them, so the count is what `torch.cuda.max_memory_allocated` would say of the same
statements, weights and library workspaces apart.

Where the CPU is not a GPU: its dropout keeps a float mask (CUDA: one byte an element), so jobs here have
none; its autocast leaves LayerNorm in bfloat16 (CUDA: float32), so only models with RMSNorm are compared; it
leaves sums in bfloat16 too (CUDA: float32), which is made up for here; and memory that a kernel takes for
itself is not seen, but for softmax's backward.
"""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.memory.infer import inference_memory
from planner.memory.moments import CardMemory, Snapshot
from planner.memory.tape import rounded
from planner.memory.train import training_memory
from planner.types import Strategy, Workload
from profiles.architecture import architecture
from profiles.schema import Architecture

BATCH, TOKENS = 2, 256
SHAPE = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip


class Storages(TorchDispatchMode):
    """Counts live storages made under it: bytes now, and the most there were since `mark()`."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._add(leaf)
        if func is torch.ops.aten._softmax_backward_data.default:
            # grad * output, which CUDA's kernel makes first (planner.exact.kernels)
            self.peak = max(self.peak, self.live + rounded(args[0].numel() * args[0].element_size()))
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        n = rounded(storage.nbytes())
        self._seen[storage] = n
        self.live += n
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, n)

    def _drop(self, n: int) -> None:
        self.live -= n

    def mark(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live


@dataclass(frozen=True)
class Case:
    """One tiny model and one job."""

    model_type: str
    method: str
    """full, lora or prefill."""
    checkpointing: bool = False
    attention: str = "sdpa"
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def vocabulary(self) -> int:
        """Small under checkpointing, so that a layer and not the logits decides the peak."""
        return 64 if self.checkpointing else 1000

    def __str__(self) -> str:
        return "-".join(
            [self.model_type, self.method, *(["checkpointed"] if self.checkpointing else []), self.attention]
        )


@dataclass(frozen=True)
class Peaks:
    """Most bytes beside weights while running forward (loss included) and backward; 0 where there is none."""

    forward: int
    backward: int = 0


def build(case: Case) -> tuple[torch.nn.Module, Architecture]:
    """The real module with random bfloat16 weights, and our description of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**SHAPE, "vocab_size": case.vocabulary, **case.extra}
    config = AutoConfig.for_model(case.model_type, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=case.attention)
    return model, architecture(json.loads(json.dumps(config.to_dict(), default=str)))


def adapt(model: torch.nn.Module) -> torch.nn.Module:
    """The module with LoRA of rank 8 on every linear, as the executor puts it there."""
    from planner.exact.adapters import add_adapters

    return add_adapters(model, Workload(task="train", method="lora", lora_dropout=0.0), Strategy())


def trace(case: Case) -> tuple[Peaks, Peaks]:
    """(traced, predicted) for one case."""
    model, arch = build(case)
    tokens = torch.randint(0, case.vocabulary, (BATCH, TOKENS))
    if case.method == "prefill":
        return _trace_prefill(model.eval(), tokens), _predict_prefill(case, arch)
    if case.method == "lora":
        model = adapt(model)
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _trace_training(model, tokens), _predict_training(case, arch)


def _known(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers(), tokens]


def _trace_prefill(model: torch.nn.Module, tokens: torch.Tensor) -> Peaks:
    with torch.no_grad(), Storages(*_known(model, tokens)) as count:
        model(tokens, use_cache=True, logits_to_keep=1)
    return Peaks(count.peak)


_narrow_sum = torch.Tensor.sum


def _sum(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`sum` as CUDA's autocast has it."""
    if x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu"):
        kwargs.setdefault("dtype", torch.float32)
    return _narrow_sum(x, *args, **kwargs)


def _trace_training(model: torch.nn.Module, tokens: torch.Tensor) -> Peaks:
    with Storages(*_known(model, tokens)) as count, mock.patch.object(torch.Tensor, "sum", _sum):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(input_ids=tokens, labels=tokens, use_cache=False)
        loss, logits = out.loss, out.logits
        wide = logits.float()  # accelerate returns float32 logits
        forward = count.peak
        del out, logits, wide
        gc.collect()
        count.mark()
        loss.backward()
    return Peaks(forward, count.peak)


APART = {"weights", "adapters", "library workspace", "optimizer state"}


def _beside(shots: tuple[Snapshot, ...]) -> int:
    return max(sum(item.bytes for item in shot.lines if item.name not in APART) for shot in shots)


def _predict_prefill(case: Case, arch: Architecture) -> Peaks:
    work = Workload(task="infer", prompt_tokens=TOKENS, new_tokens=1, batch_size=BATCH)
    memory = inference_memory(arch, work, Strategy(attention=case.attention), 0)
    return Peaks(_beside(tuple(shot for shot in memory.snapshots if shot.moment == "prefill")))


def _predict_training(case: Case, arch: Architecture) -> Peaks:
    work = Workload(task="train", method=case.method, seq_len=TOKENS, batch_size=BATCH, lora_dropout=0.0)
    how = Strategy(gradient_checkpointing=case.checkpointing, attention=case.attention, optimizer="sgd")
    memory: CardMemory = training_memory(arch, work, how, 0)
    # forward, loss while running forward, then loss and layers while running backward, then the optimizer
    return Peaks(_beside(memory.snapshots[:2]), _beside(memory.snapshots[2:-1]))
