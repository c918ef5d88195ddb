"""The arithmetic of each line of an estimate, with the numbers put in."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from planner.anatomy import cache_rate
from planner.memory.optimizer import OPTIMIZERS
from planner.memory.train import training_pass
from planner.memory.weights import WIDTH, weight_bytes
from planner.types import MemoryLine, Strategy, Workload
from planner.units import MIB, format_bytes, format_gib
from profiles.schema import Architecture


class Terms(Struct, frozen=True):
    """What the formulas are about."""

    arch: Architecture
    work: Workload
    how: Strategy
    trained: int
    """Parameters that are trained."""

    @property
    def tokens(self) -> int:
        """Of one pass over a batch."""
        length = self.work.seq_len if self.work.task == "train" else self.work.prompt_tokens
        return self.work.sequences * length

    @property
    def stream_bytes(self) -> int:
        """The residual stream between two layers."""
        return self.tokens * self.arch.hidden_size * self.stream_width

    @property
    def stream_width(self) -> int:
        """Bytes of one of its elements."""
        width = WIDTH[self.how.dtype]
        return training_pass(self.arch, self.work, self.how).stream if self.work.task == "train" else width


def arithmetic(line: MemoryLine, terms: Terms) -> str:
    """A line's formula with its numbers; as the estimate gave it where there is nothing to add."""
    write = _WRITERS.get(line.name)
    return write(line, terms) if write is not None and line.basis != "traced" else line.formula


def _weights(line: MemoryLine, terms: Terms) -> str:
    how = terms.how
    weights = weight_bytes(terms.arch, how.quant, how.quant_experts, how.dtype)
    every = weights.counted(terms.arch.order)
    if line.bytes == weights.total(terms.arch.order):
        beside = f", and {format_gib(weights.unasked)} their blocks hold besides" if weights.unasked else ""
        return f"{line.formula}: the sum of the groups below{beside}"
    return f"{line.formula}: {format_gib(line.bytes)} of the {format_gib(every)} of all groups below"


def _adapters(line: MemoryLine, terms: Terms) -> str:
    work = terms.work
    variant = {"dora": " + outputs (magnitudes)"}.get(work.lora_variant, "")
    return (
        f"{work.lora_rank} x (inputs + outputs){variant} of each adapted linear = {terms.trained:,} "
        f"parameters x {WIDTH[work.adapter_dtype]} B"
    )


def _optimizer(line: MemoryLine, terms: Terms) -> str:
    kind = OPTIMIZERS[terms.how.optimizer]
    if kind.factored:
        return f"{terms.how.optimizer}: a row and a column a matrix"
    stored = f"{kind.bits} bits" if kind.bits else "the parameters' dtype"
    where = "; tensors of 100,000 elements and more are in managed memory" if kind.paged else ""
    each = line.bytes / max(terms.trained, 1)
    return (
        f"{terms.how.optimizer}: {kind.states} states in {stored}{where}; {each:.2f} B x "
        f"{terms.trained:,} parameters"
    )


def _workspace(line: MemoryLine, terms: Terms) -> str:
    times = 2 if terms.work.task == "train" else 1
    threads = "forward and the autograd thread" if times == 2 else "one handle"
    return f"cuBLAS, {threads}: {times} x {line.bytes / times / MIB:.3g} MiB"


def _checkpoints(line: MemoryLine, terms: Terms) -> str:
    count = line.bytes / max(terms.stream_bytes, 1)
    return f"{count:.0f} layer inputs x {_stream(terms)}"


def _stream(terms: Terms) -> str:
    return f"{terms.tokens} tokens x {terms.arch.hidden_size} x {terms.stream_width} B"


def _loss(line: MemoryLine, terms: Terms) -> str:
    one = 4 * terms.tokens * terms.arch.vocab_size
    size = f"{terms.tokens} tokens x {terms.arch.vocab_size} vocabulary x 4 B = {format_gib(one)}"
    if terms.how.loss == "fused" or terms.how.kernels == "liger":
        return f"in chunks: {line.bytes / one:.2f} of a whole float32 copy of the logits ({size})"
    return f"{line.bytes / one:.2f} float32 copies of the logits, each {size}; the final norm among them"


def _kv_cache(line: MemoryLine, terms: Terms) -> str:
    rate = cache_rate(terms.arch, terms.how)
    each = format_bytes(rate.bytes_per_token)
    return f"{line.formula}; {each} a token of a sequence over all layers ({rate.formula})"


def _streams(line: MemoryLine, terms: Terms) -> str:
    return f"{line.formula}: {line.bytes / max(terms.stream_bytes, 1):.1f} x {_stream(terms)}"


def _gradients(line: MemoryLine, terms: Terms) -> str:
    each = line.bytes / max(terms.trained, 1)
    return f"{line.formula}: {each:.2f} B x {terms.trained:,} trained parameters"


_WRITERS: dict[str, Callable[[MemoryLine, Terms], str]] = {
    "weights": _weights,
    "adapters": _adapters,
    "optimizer state": _optimizer,
    "library workspace": _workspace,
    "checkpoints": _checkpoints,
    "logits and loss": _loss,
    "kv cache": _kv_cache,
    "activations": _streams,
    "layer in work": _streams,
    "gradients": _gradients,
}
