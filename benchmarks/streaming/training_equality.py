"""Twenty optimizer steps under engine stream beside engine resident: losses, gradients, adapters, bit by bit.

    python benchmarks/streaming/training_equality.py [--model qwen2.5-0.5b] [--layers 5] [--quant nf4] [--cpu]
        [--cases none-resident half-resident vocabulary traps]

A few layers of the model's real shapes with random weights, more than there are slots; every step is two
micro-batches of different lengths, with dropout, in deterministic kernels. For bf16, NF4 and LLM.int8 bases:
no checkpointing, reentrant and non-reentrant, with checkpoints on the card and in RAM, with no layer resident
and with every other one. Once more with the vocabulary outside the card.

Then what shows that such a comparison can fail: slots that are reused in an order nobody foresees. Ours stays
equal; bitsandbytes' own products, put back in its place, must show the first loss right and the gradients
wrong. Prints a JSON line a case; exit code 1 if one does not end as expected. `--cpu`: on the CPU with narrow
layers, to try the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import equality  # sets cuBLAS' workspace before torch comes
import torch
from shuffled import Shuffled

from executor.activation_offload import offloading
from executor.engines import resident, stream
from executor.losses import chunked_loss
from executor.quiet import silence_loaded
from executor.source import ModelSource
from executor.streaming.training import lean
from executor.train import keep_unpacked
from planner.exact.adapters import add_adapters
from planner.types import Quant, Workload
from profiles.catalogue import load_model

STEPS = 20
LENGTHS = (256, 130)
"""Tokens of the two micro-batches of a step, of `ROWS` sequences each."""
ROWS = 2
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 320}
WAYS = (("none", False), *((mode, away) for mode in ("reentrant", "non-reentrant") for away in (False, True)))
"""Of checkpointing, and whether checkpoints go to RAM."""
CASES = ("none-resident", "half-resident", "vocabulary", "traps")
TRAPS: tuple[tuple[Quant, str], ...] = (("nf4", "none"), ("nf4", "non-reentrant"), ("int8", "none"))


@dataclass(frozen=True)
class Bench:
    """What is trained, and where."""

    model: str
    config: dict[str, Any]
    device: torch.device
    steps: int = STEPS

    @property
    def layers(self) -> int:
        """Of the shortened model."""
        return int(self.config["num_hidden_layers"])


@dataclass
class Seen:
    """One training: the loss of every micro-batch, accumulated gradients of the first and the last step, and
    the adapters in the end; all in host memory."""

    losses: list[torch.Tensor]
    gradients: list[torch.Tensor]
    weights: list[torch.Tensor]

    def digest(self) -> str:
        """Of the adapters."""
        whole = hashlib.sha256()
        for tensor in self.weights:
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()[:16]


def main() -> int:
    """Compare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quant", nargs="+", choices=equality.QUANTS, default=equality.QUANTS)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="only these")
    args = parser.parse_args()
    comparisons = list(chosen(args.cases, args.quant, args.layers))
    if not comparisons:
        parser.error(f"--cases {' '.join(args.cases)} compares nothing in {' '.join(args.quant)}")
    silence_loaded(debug=False)
    torch.use_deterministic_algorithms(True)  # with warnings only, attention's backward is not
    bench = bench_of(args.model, args.layers, args.cpu, args.steps)
    unexpected = sum(attempt(comparison, bench, *what) for comparison, *what in comparisons)
    return int(unexpected > 0)


def chosen(cases: Sequence[str], quants: Sequence[Quant], layers: int) -> Iterator[tuple[Any, ...]]:
    """Comparisons and their arguments beside the bench."""
    for case, kept in (("none-resident", 0), ("half-resident", layers // 2)):
        if case in cases:
            yield from ((compare, quant, kept) for quant in quants)
    if "vocabulary" in cases and "nf4" in quants:
        yield (vocabulary_outside,)
    if "traps" in cases:
        yield from ((trap, quant, mode) for quant, mode in TRAPS if quant in quants)


def attempt(comparison: Callable[..., int], bench: Bench, *what: Any) -> int:
    """A comparison, or 1 and its error printed, so that the others are still made."""
    try:
        return comparison(bench, *what)
    except Exception as error:
        row = {"case": [comparison.__name__, *what], "error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**row, "as_expected": False}), flush=True)
        return 1


def bench_of(model: str, layers: int, cpu: bool = False, steps: int = STEPS) -> Bench:
    """The first `layers` layers of a catalogue model on the first card, or narrow ones on the CPU."""
    config = {**load_model(model).config, "num_hidden_layers": layers, **(NARROW if cpu else {})}
    return Bench(model, config, torch.device("cpu") if cpu else equality.DEVICE, steps)


def compare(bench: Bench, quant: Quant, kept: int) -> int:
    """Every way of checkpointing with `kept` layers resident; how many comparisons differ."""
    with opened(bench, quant, None) as (model, _):
        modes = dict.fromkeys(mode for mode, _ in WAYS)
        want = {mode: train(bench, model, mode) for mode in modes}
        # unequal here, it is the kernels and not the streaming
        unequal = report(bench, quant, None, "none", False, want["none"], train(bench, model, "none"))
    with opened(bench, quant, kept) as (model, loaded):
        for mode, away in WAYS:
            got = train(bench, model, mode, away=away)
            unequal += report(bench, quant, loaded, mode, away, want[mode], got)
    return unequal


def vocabulary_outside(bench: Bench) -> int:
    """Embeddings in RAM, the output projection streamed in blocks, checkpoints in RAM; whether it differs."""
    mode = "non-reentrant"
    with opened(bench, "nf4", None) as (model, _):
        want = train(bench, model, mode, fused=True)
    with opened(bench, "nf4", 0, equality.OUTSIDE) as (model, loaded):
        got = train(bench, model, mode, away=True, fused=True)
    return report(bench, "nf4", loaded, mode, True, want, got, vocabulary="host")


def trap(bench: Bench, quant: Quant, mode: str) -> int:
    """One step in slots that are reused in any order, with our products and with bitsandbytes' own, which
    keep the slot's memory for backward; how many of the two do not end as expected."""
    once = dataclasses.replace(bench, steps=1)
    unexpected = 0
    with opened(once, quant, None) as (model, _):
        want = train(once, model, mode)
    for stock in (False, True):
        with ExitStack() as changed:
            changed.enter_context(patch("executor.streaming.streamer.Schedule", Shuffled))
            changed.enter_context(patch.object(stream, "SLOTS", 3))
            if stock:
                changed.enter_context(patch("executor.streaming.linears.adopt", lambda _streamer: None))
            # lean, a layer's backward follows its being computed again: nothing comes between
            model, loaded = changed.enter_context(opened(once, quant, 0, leanly=False))
            got = train(once, model, mode)
            products = "bitsandbytes" if stock else "ours"
            unexpected += report(once, quant, loaded, mode, False, want, got, reused=products)
    return unexpected


@contextmanager
def opened(
    bench: Bench, quant: Quant, kept: int | None, outside: tuple[str, ...] = (), leanly: bool = True
) -> Iterator[tuple[Any, Any]]:
    """The model with adapters, and how it was loaded: by engine resident for `kept` None. `leanly`: what
    streams is trained as the executor does, not as peft and torch do."""
    job = Workload(task="train", method="lora" if quant == "none" else "qlora")
    asked = equality.request(bench.model, quant, kept, job, outside)
    asked = dataclasses.replace(asked, source=ModelSource(None, dict(bench.config)), device=bench.device)
    loaded = (resident if kept is None else stream).load(asked)
    try:
        model = add_adapters(loaded.model, job, asked.candidate.strategy).train()
        model.config.use_cache = False
        keep_unpacked(model)
        with lean(model) if leanly and kept is not None else nullcontext():
            yield model, loaded
    finally:
        equality.synchronize(bench.device)
        loaded.close()
        loaded.model = None


def train(bench: Bench, model: Any, mode: str, *, away: bool = False, fused: bool = False) -> Seen:
    """Train adapters that begin the same every time. `fused`: with the loss in chunks."""
    trained = _adapters_as_new(model)
    if mode != "none":
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":
        model.enable_input_require_grads()
    base, tokens = model.get_base_model(), ROWS * max(LENGTHS)
    try:
        with (
            chunked_loss(model) if fused else nullcontext(),
            offloading(base, tokens, bench.device) if away else nullcontext(),
        ):
            return _steps(bench, model, trained)
    finally:
        if mode == "reentrant":
            model.disable_input_require_grads()
        if mode != "none":
            model.gradient_checkpointing_disable()


def _adapters_as_new(model: Any) -> list[torch.Tensor]:
    """B is drawn, too: with zeros, A has no gradient in the first step."""
    draws = torch.Generator().manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.05)
            parameter.grad = None
    return trained


def _steps(bench: Bench, model: Any, trained: list[torch.Tensor]) -> Seen:
    torch.manual_seed(0)  # of dropout
    draws = torch.Generator().manual_seed(4)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    words = min(1000, bench.config["vocab_size"])
    seen = Seen([], [], [])
    for step in range(bench.steps):
        for length in LENGTHS:
            ids = torch.randint(0, words, (ROWS, length), generator=draws).to(bench.device)
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.losses.append(loss.detach())
        if step in (0, bench.steps - 1):
            seen.gradients += [p.grad.cpu() for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    seen.losses = [loss.cpu() for loss in seen.losses]
    seen.weights = [p.detach().cpu() for p in trained]
    return seen


_last = time.monotonic()


def report(
    bench: Bench,
    quant: str,
    loaded: Any,
    mode: str,
    away: bool,
    want: Seen,
    got: Seen,
    *,
    vocabulary: str = "card",
    reused: str | None = None,
) -> int:
    """Print one comparison; 1 if it did not end as expected. `loaded` None: resident beside itself; `reused`:
    whose products computed in slots that are reused in any order."""
    global _last
    row: dict[str, Any] = {
        "engine": "resident" if loaded is None else "stream",
        "quant": quant,
        "checkpointing": mode,
        "checkpoints": "host" if away else "card",
        "vocabulary": vocabulary,
        "layers_resident": bench.layers if loaded is None else loaded.layers_resident,
        "layers_streamed": 0 if loaded is None else loaded.layers_streamed,
        "slots": 0 if loaded is None else loaded.slots,
        "steps": bench.steps,
    }
    if reused is not None:
        row["reused_slots"] = reused
    equal = {
        "first_loss_equal": torch.equal(want.losses[0], got.losses[0]),
        "losses_equal": same(want.losses, got.losses),
        "gradients_equal": same(want.gradients, got.gradients),
        "weights_equal": same(want.weights, got.weights),
    }
    finite = all(bool(tensor.isfinite().all()) for tensor in (*want.losses, *want.gradients, *want.weights))
    if reused == "bitsandbytes":
        expected = equal["first_loss_equal"] and not equal["gradients_equal"]
    else:
        expected = all(equal.values())
    streamed = loaded is None or loaded.layers_streamed > loaded.slots > 1
    row |= {**equal, "tensors": len(want.weights), "finite": finite, "adapter": got.digest()}
    now = time.monotonic()
    row |= {"as_expected": expected and finite and streamed, "seconds": round(now - _last, 2)}
    _last = now
    print(json.dumps(row), flush=True)
    return int(not row["as_expected"])


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """As many tensors, of the same bits."""
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    sys.exit(main())
