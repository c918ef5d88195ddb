"""What a pass moves and launches beside its large matrix products: norms, rotations, activations, sums,
adapters, casts.

transformers, peft and torch run these one operator at a time, and each reads its inputs from the card's
memory and writes its output there. Counted here: bytes for one token, and launches, of one forward pass
through all layers and of the backward pass behind it, as the code runs under the Trainer's autocast
(`models/llama/modeling_llama.py` and its siblings, `tuners/lora/{layer,bnb}.py`). Products with a side as
short as an adapter's rank take as long as the bytes they move, so they are counted here too.
`tests/exact/test_exact_elementwise.py` holds all of it against the operators that really run.

Not followed operator by operator: recurrent mixers, DoRA, the routing of experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from planner.identity import identity_cache
from planner.memory.adapters import fuses_experts, is_target
from planner.memory.shapes import numerics
from planner.types import Strategy, Workload
from planner.work import RECURRENT_KERNELS, expert_kernels
from profiles.schema import Architecture, Attention, FeedForward, Layer, Linear, Norm


class Count(Struct, frozen=True):
    """Bytes for one token, and launches whatever the tokens; forward, and the backward behind it."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_kernels: float = 0.0
    backward_kernels: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.forward_bytes + other.forward_bytes,
            self.backward_bytes + other.backward_bytes,
            self.forward_kernels + other.forward_kernels,
            self.backward_kernels + other.backward_kernels,
        )

    def over(self, features: float, times: float = 1) -> Count:
        """`times` such modules, each over `features` features."""
        return Count(
            self.forward_bytes * features * times,
            self.backward_bytes * features * times,
            self.forward_kernels * times,
            self.backward_kernels * times,
        )


# Bytes for a feature in 16 bits, and launches.
RMS_NORM = Count(36, 84, 8, 14)
"""To float32, square, mean, product, back, times the weight; the same seven times over in backward."""
FLOAT32_WEIGHT = Count(4, 4, 2, 0)
"""The weight comes before the norm leaves float32 (Gemma, OLMo 2)."""
NORM_GRADIENT = Count(0, 8, 0, 2)
"""Of a norm's own weight: a product and the sum of its rows."""
LAYER_NORM = Count(20, 26, 3, 3)
"""`nn.LayerNorm`, float32 under autocast."""
ROTATION = Count(20, 32, 5, 8)
"""Of queries or keys: two products, a half negated and put together, a sum."""
GATE = Count(10, 18, 2, 3)
"""The activation of one half times the other."""
ACTIVATION = Count(4, 6, 1, 1)
SUM = Count(6, 6, 1, 1)
"""The residual stream and what a mixer adds; two gradients of it."""
JOINED_GATE, JOINED_QUERIES = Count(0, 24, 0, 3), Count(0, 20, 0, 5)
"""Gradients of the parts of one projection put together: of a gate; of queries, keys and values."""
RECURRENT = Count(120, 200, RECURRENT_KERNELS, RECURRENT_KERNELS)
"""A guess at convolution, gates and scan: each launch moves 4 bytes of a feature, more in backward."""
GRADIENTS_MEET = Count(0, 6, 0, 1)
"""Where another linear reads the same input."""
ATTENTION = Count(2, 4, 1, 1)
"""Queries, keys, values and output, once through a fused kernel."""
SCORES = Count(26, 40, 8, 8)
"""A score of eager attention, between two products: scale, mask, softmax in float32, back; two of the
launches repeat keys and values."""
CAPPED_SCORES = Count(12, 18, 3, 3)
LIGER_NORM, LIGER_ROTATION, LIGER_GATE = Count(4, 6, 1, 2), Count(4, 4, 0.5, 0.5), Count(6, 10, 1, 1)


class _How(Struct, frozen=True):
    """What decides the counts beside the architecture."""

    full: bool
    """Base weights are trained; False where adapters are, and in inference."""
    targets: str
    """Linears that adapters sit on; empty for none."""
    wide: bool
    """Adapters are float32."""
    dropout: bool
    quant: str
    liger: bool
    scores: int
    """Tokens eager attention sees; 0 for a fused kernel."""


def elementwise(arch: Architecture, work: Workload, how: Strategy) -> Count:
    """All layers and the final norm."""
    train = work.task == "train"
    adapted = train and work.method != "full"
    length = work.seq_len if train else work.prompt_tokens
    key = _How(
        full=train and not adapted,
        targets=work.lora_targets if adapted else "",
        wide=work.adapter_dtype == "fp32",
        dropout=work.lora_dropout > 0,
        quant=how.quant,
        liger=train and how.kernels == "liger",
        scores=length if how.attention == "eager" else 0,
    )
    known = _known(arch)
    if key not in known:
        known[key] = _model(arch, key)
    return known[key]


@identity_cache
def _known(arch: Architecture) -> dict[_How, Count]:
    return {}


def _model(arch: Architecture, how: _How) -> Count:
    total = _norm(arch, arch.final_norm, 1, how) if arch.final_norm else Count()
    for kind, layer in enumerate(arch.kinds):
        total += _layer(arch, layer, how).over(1, arch.order.count(kind))
    return total


def _layer(arch: Architecture, layer: Layer, how: _How) -> Count:
    total = SUM.over(arch.hidden_size, 2)
    for norm in (*layer.norms, *layer.feed_forward.norms):
        total += _norm(arch, norm, 1, how)
    total += _mixer(arch, layer.attention, how) + _channel(arch, layer.feed_forward, how)
    for linear in (*layer.attention.linears, *layer.feed_forward.linears, *layer.linears):
        total += _linear(arch, linear, how)
    return total


def _norm(arch: Architecture, norm: Norm, heads: int, how: _How) -> Count:
    features = norm.size * heads
    if norm.kind == "layer":
        one = LAYER_NORM
    elif how.liger:
        one = LIGER_NORM
    else:
        one = RMS_NORM + FLOAT32_WEIGHT if arch.model_type in numerics().float32_norm else RMS_NORM
    return (one + NORM_GRADIENT if how.full and norm.weight and not how.liger else one).over(features)


def _mixer(arch: Architecture, mixer: Attention, how: _How) -> Count:
    if mixer.kind in ("recurrent", "none"):
        return RECURRENT.over(arch.hidden_size) if mixer.kind == "recurrent" else Count()
    total = Count()
    if len(mixer.linears) == 2:
        total += JOINED_QUERIES.over(mixer.linears[0].outputs)
    for norm in mixer.norms:
        name = norm.name.rsplit(".", 1)[-1]
        heads = 0 if mixer.latent else mixer.heads if name.startswith("q") else mixer.kv_heads
        total += _norm(arch, norm, max(1, heads * mixer.head_dim // norm.size), how)
    rotation = LIGER_ROTATION if how.liger else ROTATION
    if mixer.rope:
        features = mixer.latent.rope_dim if mixer.latent else mixer.head_dim
        total += rotation.over(features * mixer.heads) + rotation.over(features * max(1, mixer.kv_heads))
    value = mixer.value_dim or mixer.head_dim
    total += ATTENTION.over(2 * mixer.heads * value + mixer.kv_heads * (mixer.head_dim + value))
    if how.scores:
        one = SCORES + CAPPED_SCORES if mixer.softcap else SCORES
        total += one.over(mixer.heads * how.scores)
    return total + _shared_inputs(arch, mixer.linears)


def _channel(arch: Architecture, channel: FeedForward, how: _How) -> Count:
    gate = LIGER_GATE if how.liger else GATE
    total = _shared_inputs(arch, channel.linears)
    if channel.intermediate:
        total += (ACTIVATION if channel.kind == "plain" else gate).over(channel.intermediate)
    if channel.kind == "gated" and len(channel.linears) == 2:
        total += JOINED_GATE.over(channel.intermediate)
    experts = channel.experts
    if experts is not None:  # each row is gathered, weighted and summed once for each of its experts
        total += gate.over(experts.per_token * experts.intermediate)
        total += (SUM + ACTIVATION + ACTIVATION).over(experts.per_token * arch.hidden_size)
        kernels = expert_kernels(experts)
        total += Count(0, 0, kernels, kernels)
    return total


def _shared_inputs(arch: Architecture, linears: tuple[Linear, ...]) -> Count:
    """All linears of a mixer but its last read one input, whose gradient is the sum of theirs."""
    return GRADIENTS_MEET.over(arch.hidden_size, max(0, len(linears) - 2))


def _linear(arch: Architecture, linear: Linear, how: _How) -> Count:
    total = Count(0, 0, 1, 1)
    packed = how.quant != "none" and linear.quantized
    if how.full:
        total += Count(0, 2.0 * linear.outputs * linear.bias, 0, 1 + linear.bias)
    if how.targets and is_target(linear, how.targets, _fuses_experts(arch)):
        total += sum(_adapter(linear, packed, how), Count())
    return total


_fuses_experts = identity_cache(fuses_experts)


def _adapter(linear: Linear, packed: bool, how: _How) -> Iterator[Count]:
    """LoRA on one linear. Above packed weights peft leaves casts to autocast, and clones their result."""
    ins, outs = linear.inputs, linear.outputs
    widened = how.wide and not packed
    if widened:  # the input to float32 and, dropped out, back to 16 bits for the product
        yield Count(12, 12, 2, 2).over(ins)
    if how.wide:
        yield Count(0, 0, 2, 2)  # A and B to 16 bits
    if how.dropout:  # read, written, and a byte of its mask
        yield (Count(9, 9, 1, 1) if widened else Count(5, 5, 1, 1)).over(ins)
    if packed and how.quant == "nf4":
        yield Count(4, 0, 1, 0).over(outs)
    yield Count(2, 4, 1, 2).over(ins)  # times A; gradients of A and of the input
    yield Count(2, 4, 1, 2).over(outs)  # times B
    yield Count(4, 4, 1, 1).over(outs)  # scaled
    yield Count(6, 0, 1, 0).over(outs)  # added to the base's
    yield GRADIENTS_MEET.over(ins)


LOSS_BYTES = {"full": 42.0, "liger": 20.0, "chunked": 70.0}
"""Of cross-entropy for a token and vocabulary entry, forward and backward.

Full: logits to float32 for the loss and again for what the Trainer keeps, log_softmax; its gradient, that of
log_softmax, back to 16 bits. Liger: both at once, a chunk at a time. Chunked (`planner.exact.chunked_loss`):
logits to float32 twice, once with the passes of logsumexp over them, once with those of their gradient.
"""

__all__ = ["LOSS_BYTES", "Count", "elementwise"]
