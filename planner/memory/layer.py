"""One decoder layer on the tape: mixers, norms, residual stream; and what a layer costs, pass by pass."""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from planner.memory.activations import activation
from planner.memory.attention import attention
from planner.memory.experts import routed_experts
from planner.memory.forward import Pass, linear, multiply, norm, normed, outlier_share
from planner.memory.tape import Tape, Tensor, rounded
from profiles.schema import Architecture, FeedForward, Layer, Linear, Norm, Parameter


class LayerCost(Struct, frozen=True):
    """Bytes of one layer's pass, relative to what was alive when it began (its input is alive, uncounted)."""

    forward_peak: int
    """Most bytes above the start while running forward without recording, output included."""
    output: int
    """Bytes of the layer's output."""
    leaked: int
    """Bytes a checkpointed forward keeps besides its input (ctx attributes of int8 matmuls)."""
    saved: int
    """Bytes autograd keeps after a recorded forward: the output not counted, the input only where it is
    kept."""
    record_peak: int
    """Most bytes above the start during a recorded forward."""
    backward_peak: int
    """Most bytes during backward, counting what the layer saved and the gradient of its output."""
    recompute_peak: int
    """The same under checkpointing: recompute with recording, then backward, above input and output
    gradient."""
    gradients: int
    """Bytes of parameter gradients this layer leaves behind."""
    width: int = 2
    """Bytes of an element of its output."""
    saving_ops: int = 0
    """Ops of a recorded forward that save something: recomputation ends at the last."""


@lru_cache(maxsize=4096)
def layer_cost(layer: Layer, p: Pass, hidden: int, first: bool = False) -> LayerCost:
    """Replay one layer three ways: plain forward, recorded forward and backward, checkpointed backward.

    `first`: the layer's input needs no gradient.
    """
    p = replace(p, hidden=hidden)
    n = rounded(p.tokens * hidden * p.stream)
    plain = Tape(recording=False)
    x = Tensor(n, needs_grad=p.train, width=p.stream)
    out = run_layer(plain, p, x, layer)
    forward_peak, output, width = plain.peak, out.bytes, out.width
    leaked = 0 if p.at_once else _pinned(plain, x)  # engine stream's forward makes no node to hold a ctx
    if not p.train:
        return LayerCost(forward_peak, output, 0, 0, forward_peak, 0, 0, 0, width)

    tape = Tape()
    x = Tensor(n, needs_grad=not first, width=p.stream)
    out = run_layer(tape, p, x, layer)
    record_peak = tape.peak
    # autocast's copies of adapter weights lose their name when the pass ends; saved ones stay
    tape.leave_autocast()
    kept = tape.live - out.bytes + (n if x.refs > 1 else 0)
    tape.mark()
    grad = tape.new(out.bytes)
    extra = n if x.refs > 1 else 0
    tape.free(out)
    backward_peak = _walk_back(tape, out, grad) + extra
    gradients = tape.live - (x.grad.bytes if x.grad is not None else 0) - _pinned(tape, x)
    ops = tape.saving_ops
    recompute_peak = _recompute_peak(layer, p, n, out.bytes, ops)
    return LayerCost(
        forward_peak, output, leaked, kept, record_peak, backward_peak, recompute_peak, gradients, width, ops
    )


class Through(Struct, frozen=True):
    """A pass through all layers, in their order."""

    costs: tuple[LayerCost, ...]
    inputs: tuple[int, ...]
    """Bytes of each layer's input: what a checkpoint keeps."""
    width: int
    """Bytes of an element of the last hidden state."""


def through(arch: Architecture, p: Pass) -> Through:
    """Every layer with the dtype that the one before hands it: bfloat16 embeddings can be followed by a
    float32 stream."""
    known: dict[tuple[int, int], LayerCost] = {}
    costs, inputs, width = [], [], p.stream
    for kind in arch.order:
        cost = known.get((kind, width))
        if cost is None:
            cost = layer_cost(arch.kinds[kind], replace(p, stream=width), arch.hidden_size)
            known[kind, width] = cost
        costs.append(cost)
        inputs.append(rounded(p.tokens * arch.hidden_size * width))
        width = cost.width
    return Through(tuple(costs), tuple(inputs), width)


class Embedded(Struct, frozen=True):
    """What comes before the first layer."""

    kept: int
    """Bytes that backward needs besides the first layer's input."""
    width: int
    """Bytes of an element of the first layer's input."""


def embedded(arch: Architecture, p: Pass) -> Embedded:
    """The embeddings and what the model does to them.

    Under checkpointing peft asks the embedding module's output for a gradient. That makes it a leaf, which
    autograd holds on to; where the model goes on with a product, a sum or a norm of it, the two are apart.
    """
    if not p.embeddings:
        return Embedded(0, p.stream)
    tape = Tape()
    x = tape.new(p.tokens * arch.hidden_size * p.stream, True, p.stream)
    out = tape.op((x,), x.bytes)
    if p.embeddings == "normed" and arch.final_norm is not None:
        tape.free(out)
        out = norm(tape, p, x, arch.final_norm, p.tokens)
    if p.full:  # trained embeddings are no leaf
        tape.free(x)
    return Embedded(tape.live - out.bytes, out.width)


def _pinned(tape: Tape, x: Tensor) -> int:
    """Bytes of the storages that ctx attributes hold, each once; the layer's input is not its own."""
    return sum(t.bytes for t in {id(t): t for t in tape.pinned}.values() if t is not x)


def _walk_back(tape: Tape, out: Tensor, grad: Tensor) -> int:
    out.grad = grad
    tape.mark()
    tape.backward(out)
    return tape.peak


def _recompute_peak(layer: Layer, p: Pass, n: int, output: int, saving_ops: int) -> int:
    """Backward of a checkpointed layer, from an input of `n` bytes and a gradient of `output`."""
    tape = Tape(stop_after=None if p.at_once else saving_ops)
    x = Tensor(n, needs_grad=True, width=p.stream)
    grad = tape.new(output)
    if p.at_once:  # who computes the layer again holds it to the end, and begins backward afterwards
        tape.hold(grad)
    out = run_layer(tape, p, x, layer)
    forward = tape.peak
    tape.free(out)
    tape.leave_autocast()
    out.grad = grad
    tape.mark()
    # backward of what follows the last saved tensor runs first; its gradients wait through recomputation
    waiting = tape.backward(out)
    return max(forward if p.at_once else forward + waiting, tape.peak)


def run_layer(tape: Tape, p: Pass, x: Tensor, layer: Layer) -> Tensor:
    """A decoder layer's pass over `x` of T x D, which stays. Returns what the next layer is handed."""
    out = (_parallel if layer.residual == "parallel" else _sequential)(tape, p, x, layer)
    tape.free(*tape.named)
    tape.named.clear()
    return out


def _sequential(tape: Tape, p: Pass, x: Tensor, layer: Layer) -> Tensor:
    """Residual stream of `layer`; norms in order: before, (after) attention, before, (after) feed-forward."""
    before, after = _norm_pairs(layer)
    h = x
    if after[0] is not None and before[0] is None:
        x.outliers = 1.0  # a sum of normed outputs, seen as it is: soon every column has an entry of 6.0
    if layer.attention.kind != "none":
        mixed = _scaled(tape, layer, _mixer(tape, p, h, before[0], after[0], layer))
        h = tape.add(x, mixed)
        h.outliers = x.outliers
        if p.keeps_attention:
            tape.named.append(tape.hold(mixed))
        tape.free(mixed)
    if layer.feed_forward.kind == "none":
        return h if h is not x else tape.hold(x)
    mixed = _scaled(tape, layer, _channel(tape, p, h, before[1], after[1], layer))
    out = tape.add(h, mixed)
    tape.free(mixed)
    if h is not x:
        tape.free(h)
    return out


def _scaled(tape: Tape, layer: Layer, mixed: Tensor) -> Tensor:
    """What a layer adds to the stream, times a constant where the architecture has one."""
    if not layer.residual_scale:
        return mixed
    out = tape.op((mixed,), mixed.bytes)
    tape.free(mixed)
    return out


Pair = tuple[Norm | None, Norm | None]


def _norm_pairs(layer: Layer) -> tuple[Pair, Pair]:
    """((before attention, before feed-forward), (after attention, after feed-forward))."""
    norms = layer.norms
    if len(norms) >= 4 and norms[1].name.startswith("post"):
        return (norms[0], norms[2]), (norms[1], norms[3])
    if len(norms) >= 2:
        if norms[0].name.startswith("post_attention") and norms[1].name.startswith("post_feedforward"):
            return (None, None), (norms[0], norms[1])  # OLMo 2: norms after the mixers only
        return (norms[0], norms[1]), (None, None)
    if len(norms) == 1:
        alone = layer.attention.kind == "none"
        return (None if alone else norms[0], norms[0] if alone else None), (None, None)
    return (None, None), (None, None)


def _mixer(tape: Tape, p: Pass, h: Tensor, before: Norm | None, after: Norm | None, layer: Layer) -> Tensor:
    y = norm(tape, p, h, before, p.tokens) if before else tape.hold(h)
    mixed = attention(tape, p, y, layer.attention)
    if p.keeps_normed:
        tape.named.append(tape.hold(y))
    tape.free(y)
    assert mixed is not None
    return normed(tape, p, mixed, after)


def _channel(tape: Tape, p: Pass, h: Tensor, before: Norm | None, after: Norm | None, layer: Layer) -> Tensor:
    y = norm(tape, p, h, before, p.tokens) if before else tape.hold(h)
    mixed = feed_forward(tape, p, y, layer.feed_forward)
    if not p.inline_feed_forward:
        tape.free(y)
    return normed(tape, p, mixed, after)


def _parallel(tape: Tape, p: Pass, x: Tensor, layer: Layer) -> Tensor:
    """Attention and feed-forward read the same normed input (GPT-J, Falcon, Cohere, Phi)."""
    y = norm(tape, p, x, layer.norms[0], p.tokens) if layer.norms else tape.hold(x)
    second = layer.norms[1] if len(layer.norms) > 1 else None
    later = second is not None and second.name.startswith("post")
    z = norm(tape, p, x, second, p.tokens) if second and not later else tape.hold(y)
    mixed = attention(tape, p, y, layer.attention)
    if second and later:  # GPT-NeoX norms for its feed-forward when attention is done
        tape.free(y, z)
        z = norm(tape, p, x, second, p.tokens)
        y = tape.hold(z)
    channel = feed_forward(tape, p, z, layer.feed_forward)
    total = tape.add(channel, mixed) if mixed is not None else tape.hold(channel)
    out = tape.add(total, x)
    tape.free(y, z, mixed, channel, total)
    return out


def feed_forward(tape: Tape, p: Pass, y: Tensor, spec: FeedForward) -> Tensor:
    """Dense feed-forward, shared experts, routed experts, or several of them added up. y: [T, D]."""
    if spec.experts is None:
        assert spec.linears, "a feed-forward layer has linears or experts"
        return _dense(tape, p, y, spec)
    if not spec.linears:
        return routed_experts(tape, p, y, spec.experts, spec.activation)
    gate = next((item for item in spec.linears if item.outputs == 1), None)
    if gate is None and p.shared_first:
        dense = _dense(tape, p, y, spec)
        routed = routed_experts(tape, p, y, spec.experts, spec.activation)
    elif gate is None:  # DeepSeek and its kin run the routed experts first
        routed = routed_experts(tape, p, y, spec.experts, spec.activation)
        dense = _dense(tape, p, y, spec)
    else:
        shared = _dense(tape, p, y, spec)
        routed = routed_experts(tape, p, y, spec.experts, spec.activation)
        dense = _scored(tape, p, y, shared, gate)
    out = tape.add(routed, dense)
    tape.free(routed, dense)
    return out


def _scored(tape: Tape, p: Pass, y: Tensor, dense: Tensor, gate: Linear) -> Tensor:
    """Shared experts times the sigmoid of their gate (Qwen)."""
    score = linear(tape, p, y, gate)
    probability = tape.op((score,), score.bytes, save_out=True)
    out = multiply(tape, dense, probability)
    tape.free(score, probability, dense)
    return out


def _dense(tape: Tape, p: Pass, y: Tensor, spec: FeedForward) -> Tensor:
    hidden = p.hidden
    dense = [item for item in spec.linears if not item.name.endswith(SIDEWAYS)]
    wide = [item for item in dense if item.outputs > 1 or spec.intermediate == 1]  # gates have one output
    down = next(
        (item for item in reversed(wide) if item.outputs == hidden and item.inputs != hidden), wide[-1]
    )
    up = [item for item in wide if item is not down]
    if not up:
        return linear(tape, p, y, down)
    if len(up) >= 2:
        middle = _gated(tape, p, y, up[0], up[1], spec.activation)
    elif up[0].outputs == 2 * down.inputs:  # gate and up in one linear (Phi-3, GLM): chunks are views of it
        both = linear(tape, p, y, up[0])
        gate, value = tape.view(both, both.bytes // 2), tape.view(both, both.bytes // 2)
        active = activation(tape, p, gate, spec.activation)
        middle = multiply(tape, value, active)
        tape.free(both, gate, value, active)
    else:
        raised = linear(tape, p, y, up[0])
        if p.inline_feed_forward:
            tape.free(y)
        middle = activation(tape, p, raised, spec.activation)
        tape.free(raised)
    outliers = outlier_share(hidden, p.tokens) if p.quant == "int8" and spec.kind != "plain" else 0.0
    out = linear(tape, p, middle, down, outliers)
    tape.free(middle)
    return out


SIDEWAYS = ("latent_proj", "routed_down_proj", "routed_up_proj")
"""Linears around routed experts that belong to no dense feed-forward."""


def _gated(tape: Tape, p: Pass, y: Tensor, gate_proj: Linear, up_proj: Linear, act: str) -> Tensor:
    gate = linear(tape, p, y, gate_proj)
    if p.liger:  # SwiGLU keeps gate and up and recomputes the rest (liger_kernel/ops/swiglu.py)
        up = linear(tape, p, y, up_proj)
        middle = multiply(tape, gate, up)
        tape.free(gate, up)
        return middle
    active = activation(tape, p, gate, act)
    tape.free(gate)
    up = linear(tape, p, y, up_proj)
    middle = multiply(tape, active, up)
    tape.free(active, up)
    return middle


def layer_tensors(layer: Layer) -> list[int]:
    """Elements of every parameter tensor of a layer, weights and biases apart."""
    sizes: list[int] = []
    attention_, mixer = layer.attention, layer.feed_forward
    experts = mixer.experts
    linears = [*attention_.linears, *mixer.linears, *layer.linears]
    parameters = [*layer.parameters, *attention_.parameters, *mixer.parameters]
    if experts is not None:
        linears += [item for item in experts.router if isinstance(item, Linear)]
        parameters += [item for item in experts.router if isinstance(item, Parameter)]
        parameters += experts.parameters
        linears += list(experts.linears) * experts.count
    for item in linears:
        sizes.append(item.inputs * item.outputs)
        if item.bias:
            sizes.append(item.outputs)
    for spec in (*layer.norms, *attention_.norms, *mixer.norms):
        sizes += [spec.size] * (int(spec.weight) + int(spec.bias))
    sizes += [item.elements for item in parameters if not item.buffer]
    return sizes
