"""Cross-entropy in chunks, so that the logits of a whole batch never exist at once (`loss: fused`).

The executor trains with it and the tracer follows it: what is predicted is what runs. The full loss keeps
about three fp32 copies of tokens x vocabulary; this one has those of a block of the vocabulary and a chunk of
tokens, and computes them again in backward. The output projection is read in blocks, twice: it may be
resident or come to the card block by block (`vocabulary`). transformers' own forward stays in charge: its
output projection hands the hidden states through, and its loss function is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from planner.exact.vocabulary import Blocks, blocks_of, compute_dtype, product
from planner.memory.head import CHUNK_LOGITS

CHUNK = 512
"""Tokens whose logits exist at once where the projection cannot be read in blocks."""
IGNORED = -100
"""The label of a token that is not learned; transformers' own cross-entropy ignores it too."""


@contextmanager
def chunked_loss(model: Any, **recomputing: Any) -> Iterator[None]:
    """Within, the causal language model `model` (no adapters around it) computes its training loss in chunks.

    It needs an output projection: `model.get_output_embeddings()` is not None. `recomputing`: what torch's
    `checkpoint` is asked for besides.
    """
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    patched = head.__dict__.get("forward")
    project, previous = head.forward, model.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        # position t learns token t + 1; the last one learns nothing
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
        states = logits.reshape(-1, logits.shape[-1])
        total = _sum_of_losses(head, project, states, targets, softcap, recomputing)
        items = kwargs.get("num_items_in_batch")
        if items is None:
            items = (targets != IGNORED).sum().clamp(min=1)
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)

    # capping is not linear: it must act on the logits of a chunk, not on the hidden states passed through
    if softcap is not None:
        text.final_logit_softcapping = None
    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        if patched is None:
            del head.forward
        else:
            head.forward = patched
        model.loss_function = previous
        if softcap is not None:
            text.final_logit_softcapping = softcap


def _sum_of_losses(
    head: Any,
    project: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    recomputing: dict[str, Any],
) -> torch.Tensor:
    """Sum of the losses of T tokens, a float32 scalar. Shapes: states T x D, targets T."""
    blocks = blocks_of(head)
    if blocks is None:
        return _projected(project, states, targets, softcap, recomputing)
    states = states.to(compute_dtype(states, head.weight))
    total: torch.Tensor = _Loss.apply(states, head.weight, head.bias, targets, blocks, softcap)
    return total


def _projected(
    project: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None,
    recomputing: dict[str, Any],
) -> torch.Tensor:
    """The same through the projection's own forward, over the whole vocabulary for `CHUNK` tokens at once."""

    def part(some: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = project(some).float()
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=states.device)
    for start in range(0, states.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(part, states[chunk], targets[chunk], use_reentrant=False, **recomputing)
    return total


@dataclass(frozen=True)
class _Part:
    """One block of the vocabulary for one chunk of tokens."""

    tokens: slice
    logits: torch.Tensor
    """C x R, float32, capped."""
    column: torch.Tensor
    """Of each token's target in this block, C x 1; 0 where it is in another one."""
    here: torch.Tensor
    """Whether the target is in this block, C x 1."""


def _parts(
    states: torch.Tensor,
    rows: torch.Tensor,
    start: int,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> Iterator[_Part]:
    step = max(1, CHUNK_LOGITS // rows.shape[0])
    for first in range(0, states.shape[0], step):
        tokens = slice(first, first + step)
        logits = product(states[tokens], rows, bias, start).float()
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        column = (targets[tokens] - start).unsqueeze(1)
        here = (column >= 0) & (column < rows.shape[0])
        yield _Part(tokens, logits, column.where(here, 0), here)
        del logits


class _Loss(torch.autograd.Function):
    """Sum over the tokens of log(sum(exp(logits))) - logit of the target.

    Forward goes through the blocks with a running log of the sum; backward, in reverse, computes each block's
    logits again. Autocast has no part in it: dtypes are settled before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        blocks: Blocks,
        softcap: float | None,
    ) -> torch.Tensor:
        total = torch.full_like(targets, float("-inf"), dtype=torch.float32)
        wanted = torch.zeros_like(total)
        for number, start in enumerate(blocks.starts):
            for part in _parts(states, blocks.rows(number), start, targets, blocks.bias, softcap):
                at = part.tokens
                total[at] = torch.logaddexp(total[at], torch.logsumexp(part.logits, 1))
                found = part.logits.gather(1, part.column)
                wanted[at] += found.where(part.here, 0).squeeze(1)
                del part
        ctx.save_for_backward(states, targets, total)
        ctx.blocks, ctx.softcap, ctx.weight, ctx.bias = blocks, softcap, weight, bias
        return (total - wanted).where(targets != IGNORED, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        states, targets, total = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        sums = _Gradients(states, ctx.weight if trains_weight else None, ctx.bias if trains_bias else None)
        scale = gradient * (targets != IGNORED).unsqueeze(1)
        for number in reversed(range(len(blocks.starts))):
            rows, start = blocks.rows(number), blocks.starts[number]
            sums.begin(rows)
            for part in _parts(states, rows, start, targets, blocks.bias, ctx.softcap):
                sums.add(part.tokens, _slopes(part, total, scale, ctx.softcap).to(states.dtype))
                del part
            sums.end(start)
        return (*sums.results(), None, None, None)


def _slopes(part: _Part, total: torch.Tensor, scale: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Derivative of the loss by the uncapped logits, C x R, in the memory of the logits."""
    bend = None if softcap is None else 1 - (part.logits / softcap).square_()
    slopes = part.logits.sub_(total[part.tokens].unsqueeze(1)).exp_()
    slopes.scatter_add_(1, part.column, -part.here.to(slopes.dtype))
    slopes.mul_(scale[part.tokens])
    return slopes if bend is None else slopes.mul_(bend)


class _Gradients:
    """Sums of gradients in float32: of the states over all blocks; of weight and bias, where these are
    trained, over the chunks of one block."""

    def __init__(self, states: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self._states = states
        self._of_states = torch.zeros_like(states, dtype=torch.float32)
        self._of_weight = None if weight is None else torch.empty_like(weight)
        self._of_bias = None if bias is None else torch.empty_like(bias)

    def begin(self, rows: torch.Tensor) -> None:
        """The parts that follow are of the block `rows`, R x D."""
        self._rows = rows
        self._weight = None if self._of_weight is None else torch.zeros_like(rows, dtype=torch.float32)
        self._bias = None if self._of_bias is None else self._of_states.new_zeros(rows.shape[0])

    def add(self, tokens: slice, slopes: torch.Tensor) -> None:
        """One part's share; `slopes`: C x R in the dtype of the states."""
        self._of_states[tokens] += slopes @ self._rows.to(slopes.dtype)
        if self._weight is not None:
            self._weight += slopes.T @ self._states[tokens]
        if self._bias is not None:
            self._bias += slopes.float().sum(0)

    def end(self, start: int) -> None:
        """The block that begins with row `start` is done."""
        for whole, block in ((self._of_weight, self._weight), (self._of_bias, self._bias)):
            if whole is not None and block is not None:
                whole[start : start + block.shape[0]] = block

    def results(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of states, weight and bias."""
        return self._of_states.to(self._states.dtype), self._of_weight, self._of_bias
