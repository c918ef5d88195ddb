"""A tape that counts bytes: what torch's autograd allocates, saves and frees, without torch.

`Tape` replays a module's forward and backward pass over tensors that have a size and no contents. It keeps
the three things that decide a peak: which tensors Python still names, which ones autograd saved, and in what
order backward frees them. The engine follows torch's rules:

* an op's saved tensors live until its backward has run;
* a gradient that reaches a tensor twice is added in place when nobody else holds it, else out of place
  (torch/csrc/autograd/input_buffer.cpp);
* nodes run in reverse order of creation (highest sequence number first).

Sizes are bytes as the CUDA caching allocator counts them: rounded up to 512 B
(c10/cuda/CUDACachingAllocator).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.units import MIB

ALIGNMENT = 512


def rounded(n: int) -> int:
    """Bytes the allocator books for a request of `n` bytes: the next multiple of 512."""
    return -(-n // ALIGNMENT) * ALIGNMENT


LARGE = 10 * MIB
SEGMENT = 2 * MIB
UNSPLIT = MIB


def booked(n: int) -> int:
    """Bytes booked for a tensor that lives long and gets a segment of its own.

    Requests of 10 MiB and more reserve a multiple of 2 MiB; a rest of 1 MiB or less is not split off and
    counts as allocated (c10/cuda/CUDACachingAllocator: kMinLargeAlloc, kRoundLarge, kSmallSize).

    >>> booked(int(129.5 * MIB)) / MIB, booked(int(26.25 * MIB)) / MIB
    (130.0, 26.25)
    """
    n = rounded(n)
    if n < LARGE:
        return n
    whole = -(-n // SEGMENT) * SEGMENT
    return whole if whole - n <= UNSPLIT else n


class Tensor:
    """A storage: its bytes, how many hold it, and whether gradients flow to it."""

    __slots__ = ("base", "booked", "bytes", "grad", "leaf", "needs_grad", "outliers", "refs", "width")

    def __init__(self, n: int, needs_grad: bool = False, leaf: bool = False, width: int = 2) -> None:
        self.bytes = n
        self.width = width
        """Bytes of an element: what consumers that keep their input's dtype go by."""
        self.booked = n
        """Bytes freed with it: 0 for what recomputation never reaches."""
        self.base: Tensor | None = None
        """The storage this is a view of; a view has a size for its consumers but books no bytes."""
        self.refs = 1
        self.needs_grad = needs_grad
        self.leaf = leaf
        self.grad: Tensor | None = None
        self.outliers = 0.0
        """Share of its columns that LLM.int8 multiplies in 16 bits."""


class _Node:
    __slots__ = ("alias", "back_temp", "before", "grad_bytes", "inputs", "out", "saved", "through", "unpacks")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        out: Tensor,
        saved: Sequence[Tensor],
        back_temp: int,
        alias: bool = False,
        grad_bytes: int | None = None,
        unpacks: bool = False,
        before: int = 0,
        through: Tensor | None = None,
    ) -> None:
        self.inputs = inputs
        self.out = out
        self.saved = saved
        self.back_temp = back_temp
        self.before = before
        """Bytes its backward needs before there is any gradient to hand on."""
        self.through = through
        """An input that receives the output's very gradient beside those that get one of their own."""
        self.alias = alias
        self.grad_bytes = grad_bytes
        self.unpacks = unpacks
        """Its backward asks for a saved tensor, a weight included."""


class Tape:
    """Bytes alive now, and the most there ever were since `mark()`.

    `recording` is False inside a gradient-checkpointed forward pass: nothing is saved there.
    `stop_after`: the run is checkpointing's recomputation, which ends at the op that saves the last tensor
    (torch/utils/checkpoint.py, early stop); later ops are noted for backward but allocate nothing.
    """

    def __init__(self, recording: bool = True, stop_after: int | None = None) -> None:
        self.live = 0
        self.peak = 0
        self.saving_ops = 0
        """Ops so far that saved something for backward."""
        self.recording = recording
        self._stop_after = stop_after
        self.pinned: list[Tensor] = []
        """Tensors held by `ctx` attributes, which checkpointing cannot drop (bitsandbytes' int8 matmul)."""
        self.named: list[Tensor] = []
        """What a layer's frame names to its end, wanted or not."""
        self._nodes: list[_Node] = []
        self._cache: dict[object, Tensor] = {}

    # ------------------------------------------------------------------ storage

    def mark(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    @property
    def stopped(self) -> bool:
        """Recomputation is over; what follows is only noted."""
        return self._stop_after is not None and self.saving_ops >= self._stop_after

    def touch(self, n: int) -> None:
        """`n` more bytes for the length of one kernel."""
        if self.live + n > self.peak and not self.stopped:
            self.peak = self.live + n

    def new(self, n: int, needs_grad: bool = False, width: int = 2) -> Tensor:
        """Allocate a tensor of `n` bytes, held once."""
        tensor = Tensor(-(-n // ALIGNMENT) * ALIGNMENT, needs_grad, False, width)
        if self.stopped:
            tensor.booked = 0
            return tensor
        self.live += tensor.bytes
        if self.live > self.peak:
            self.peak = self.live
        return tensor

    def free(self, *tensors: Tensor | None) -> None:
        """Drop one hold on each; the last one frees the storage."""
        for tensor in tensors:
            if tensor is None:
                continue
            tensor.refs -= 1
            if tensor.refs == 0:
                if tensor.base is not None:
                    self.free(tensor.base)
                else:
                    self.live -= tensor.booked

    def hold(self, tensor: Tensor) -> Tensor:
        """One more name for the same storage."""
        tensor.refs += 1
        return tensor

    def settle(self, *tensors: Tensor) -> None:
        """What `tensors` hold goes where its bytes are counted elsewhere: a static cache takes it in."""

    def parameter(self, n: int, trainable: bool) -> Tensor:
        """A weight: its bytes are counted elsewhere, its gradient here."""
        tensor = Tensor(0, trainable, leaf=True)
        tensor.bytes = booked(n)
        return tensor

    # ------------------------------------------------------------------ autograd

    def op(
        self,
        inputs: Sequence[Tensor],
        out_bytes: int,
        save: Sequence[Tensor] = (),
        temp: int = 0,
        back_temp: int = 0,
        save_out: bool = False,
        grad_bytes: int | None = None,
        save_weight: bool = False,
        width: int = 0,
        before: int = 0,
        save_late: bool = False,
        alias: Tensor | None = None,
    ) -> Tensor:
        """Run an op: allocate `temp` during it, then its output, of the first input's dtype unless `width`
        says otherwise.

        `save`: inputs autograd keeps for backward (activations only; weights are counted elsewhere, and
        `save_weight` says that one is kept). `back_temp`: bytes its backward needs besides the gradients,
        `before`: ahead of them. `save_late`: saved when all is computed, as a Function of Python does.
        `alias`: one more input, which receives the very gradient of the output.
        `grad_bytes`: size of each input's gradient where it is not the input's own size.
        """
        needs_grad = any(t.needs_grad for t in inputs) or (alias is not None and alias.needs_grad)
        records = self.recording and needs_grad
        saves, late = records and (bool(save) or save_out or save_weight), save_out or save_late
        # inputs are saved before the kernel runs, an output after it
        self.saving_ops += saves and not late
        if temp:
            self.touch(temp + rounded(out_bytes))
        out = self.new(out_bytes, needs_grad, width or inputs[0].width)
        self.saving_ops += saves and late
        if records:
            saved = [*save, out] if save_out else list(save)
            for tensor in saved:
                tensor.refs += 1
            self._nodes.append(_Node(inputs, out, saved, back_temp, False, grad_bytes, saves, before, alias))
        return out

    def view(self, base: Tensor, n: int) -> Tensor:
        """`n` bytes of `base`: keeps all of it alive; its gradient comes back as a zero-padded full-size
        tensor."""
        out = Tensor(rounded(n), base.needs_grad, width=base.width)
        out.base = self.hold(base)
        if out.needs_grad and self.recording:
            self._nodes.append(_Node((base,), out, (), 0))
        return out

    def add(self, a: Tensor, b: Tensor, n: int | None = None) -> Tensor:
        """`a + b`: saves nothing; both inputs receive the very gradient of the sum."""
        n = max(a.bytes, b.bytes) if n is None else n
        out = self.new(n, a.needs_grad or b.needs_grad, max(a.width, b.width))
        if out.needs_grad and self.recording:
            self._nodes.append(_Node((a, b), out, (), 0, alias=True))
        return out

    def cast(self, x: Tensor, width: int) -> Tensor:
        """`x.to(dtype)`: a copy, or `x` itself held once more where it has that width already."""
        if x.width == width:
            return self.hold(x)
        return self.op((x,), x.bytes * width // x.width, width=width)

    def cached(self, key: object, weight: Tensor, n: int) -> Tensor:
        """autocast's copy of a float32 leaf weight: made once, kept until the autocast context is left."""
        hit = self._cache.get(key)
        if hit is None:
            hit = self.op((weight,), n)
            self._cache[key] = hit
        return hit

    def leave_autocast(self) -> None:
        """Drop autocast's cached copies."""
        for tensor in self._cache.values():
            self.free(tensor)
        self._cache.clear()

    def backward(self, out: Tensor) -> int:
        """Walk the nodes in reverse from `out`, whose gradient must be set. Leaf gradients stay alive.

        Returns the bytes of gradients there were when a saved tensor was first asked for, beyond those at
        the start: under checkpointing, recomputation happens then.
        """
        self._stop_after = None
        nodes, self._nodes = self._nodes, []
        start, waiting = self.live, None
        while nodes:
            node = nodes.pop()
            grad = node.out.grad
            if grad is None:
                for tensor in node.saved:
                    self.free(tensor)
                continue
            node.out.grad = None
            if node.unpacks and waiting is None:
                waiting = self.live - start
            if node.alias:
                self._pass_on(node, grad)
                continue
            if node.back_temp or node.before:
                self.touch(max(node.back_temp, node.before))
            fresh = [
                (t, self.new(t.bytes if node.grad_bytes is None else node.grad_bytes))
                for t in node.inputs
                if t.needs_grad
            ]
            if node.back_temp:
                self.touch(node.back_temp)
            for tensor in node.saved:
                self.free(tensor)
            if node.through is not None and node.through.needs_grad:
                self._accumulate(node.through, self.hold(grad))
            self.free(grad)
            for tensor, new in fresh:
                self._accumulate(tensor, new)
        return waiting or 0

    def _pass_on(self, node: _Node, grad: Tensor) -> None:
        for tensor in node.inputs:
            if not tensor.needs_grad:
                continue
            # an operand that the sum widened gets its gradient cast back
            cast = tensor.width < node.out.width
            self._accumulate(tensor, self.new(tensor.bytes) if cast else self.hold(grad))
        self.free(grad)

    def _accumulate(self, tensor: Tensor, new: Tensor) -> None:
        old = tensor.grad
        if old is None:
            tensor.grad = new
        elif old.refs == 1:
            self.free(new)
        else:
            tensor.grad = self.new(old.bytes)
            self.free(old)
            self.free(new)
