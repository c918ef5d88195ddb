"""Activation functions on the tape: what each keeps and makes, by the name a config calls it.

Most are one kernel that keeps its input. Those that transformers spells out operator by operator
(`activations.py`) keep several tensors, and in autocast `pow` answers in float32, whatever follows with it
(aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor


def activation(tape: Tape, p: Pass, x: Tensor, name: str) -> Tensor:
    """`name(x)`; x stays with its owner."""
    return _SPELLED_OUT.get(name, _one_kernel)(tape, p, x)


def _one_kernel(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """silu, gelu, gelu_pytorch_tanh, tanh ..."""
    return tape.op((x,), x.bytes, save=(x,))


def _relu(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """Keeps its result instead of its input."""
    return tape.op((x,), x.bytes, save_out=True)


def _power(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """`pow`: float32 in autocast; its backward makes two tensors more."""
    source = tape.cast(x, 4) if p.autocast else tape.hold(x)
    out = tape.op((source,), source.bytes, save=(source,), back_temp=2 * source.bytes)
    tape.free(source)
    return out


def _relu_squared(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """`square` is `pow` to the dispatcher."""
    positive = _relu(tape, p, x)
    out = _power(tape, p, positive)
    tape.free(positive)
    return out


def _gelu_new(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3)))."""
    half = tape.op((x,), x.bytes)
    cubed = _power(tape, p, x)
    for _ in range(3):  # times a constant, plus x, times a constant
        cubed = _step(tape, cubed)
    bent = tape.op((cubed,), cubed.bytes, save_out=True)
    tape.free(cubed)
    raised = tape.op((bent,), bent.bytes)
    tape.free(bent)
    out = tape.op((half, raised), raised.bytes, save=(half, raised), width=raised.width)
    tape.free(half, raised)
    return out


def _step(tape: Tape, x: Tensor) -> Tensor:
    """A sum or a product with a constant: keeps nothing."""
    out = tape.op((x,), x.bytes)
    tape.free(x)
    return out


def _xielu(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    """where(x > 0, a x^2 + b x, (expm1(min(x, eps)) - x) c + b x); autocast widens a, c and expm1."""
    wide = 4 if p.autocast else x.width
    n = x.bytes // x.width * wide
    positive = tape.new(x.bytes // x.width)
    scaled = tape.op((x,), n, width=wide)
    squared = tape.op((scaled, x), n, save=(scaled, x), width=wide)
    tape.free(scaled)
    above = _plus_line(tape, squared, x)
    least = tape.op((x,), x.bytes, save=(x,))
    source = tape.cast(least, wide)
    tape.free(least)
    grown = tape.op((source,), n, save_out=True)
    tape.free(source)
    less = tape.add(grown, x)
    tape.free(grown)
    below = _plus_line(tape, _step(tape, less), x)
    out = tape.op((above, below), n, save=(positive,))
    tape.free(positive, above, below)
    return out


def _plus_line(tape: Tape, y: Tensor, x: Tensor) -> Tensor:
    line = tape.op((x,), x.bytes)
    out = tape.add(y, line)
    tape.free(y, line)
    return out


_SPELLED_OUT: dict[str, Callable[[Tape, Pass, Tensor], Tensor]] = {
    "relu": _relu,
    "relu2": _relu_squared,
    "relu_squared": _relu_squared,
    "gelu_new": _gelu_new,
    "gelu_accurate": _gelu_new,
    "xielu": _xielu,
}

__all__ = ["activation"]
