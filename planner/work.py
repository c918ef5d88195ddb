"""Work of one pass through a model: what is computed, read and launched, whatever the card.

Everything here follows from the `Architecture` and the strategy's precisions alone, so it is counted once per
model and reused for every card. A multiply-add is two operations, as card makers count them.

Ignored: norms, rotary embedding and activation functions as operations (`planner.elementwise` counts the
bytes they move), encoders of images and sound (idle in text-only work).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from msgspec import Struct

from planner.identity import identity_cache
from planner.memory.kvcache import layer_kv_bytes, token_elements
from planner.types import Strategy
from profiles.arithmetic import expert_count, tower_count
from profiles.precisions import load_precisions, weight_bytes_per_parameter
from profiles.schema import Architecture, Attention, Experts, Layer, Linear, Norm, Parameter

# Kernels a module of transformers launches in eager mode, counted in its modelling code.
_NORM_KERNELS = {"rms": 7, "layer": 1}
_ROPE_KERNELS = 12
_ATTENTION_KERNELS = {"sdpa": 4, "eager": 8, "flash_attention_2": 6}
RECURRENT_KERNELS = 30
_GROUPED_EXPERT_KERNELS = 25
_EXPERT_KERNELS = 8
_RESIDUAL_KERNELS = 2
# Measured in decode on an H200: NF4 costs 1.7 launches more a linear than bf16, LLM.int8 18 more.
_LINEAR_KERNELS = {"none": 1, "nf4": 3, "int8": 19}
INT8_KERNELS = _LINEAR_KERNELS["int8"] - 1


class Mixing(Struct, frozen=True):
    """Token mixing of one layer as far as it grows with the context."""

    count: int
    """Layers of this kind."""
    pair_flops: int
    """Operations for one query and one key, all heads together."""
    cache_elements: int
    """Elements of keys and values kept for one token."""
    window: int | None
    """Tokens looked back on; None for all."""
    state_bytes: int
    """Recurrent state of one sequence, read and written for each token."""

    def context(self, tokens: float) -> float:
        """Tokens a query really sees out of `tokens`."""
        return tokens if self.window is None else min(tokens, float(self.window))


class Work(Struct, frozen=True):
    """Counts of one model; weights in elements."""

    layers: int
    hidden_size: int
    vocab_size: int
    linear_weights: int
    """Weights of `nn.Linear` in the layers, routed experts not among them: what bitsandbytes quantizes."""
    other_weights: int
    """Norms, biases and the rest of the layers, never quantized."""
    expert_weights: int
    """Weights of all routed experts."""
    experts_fused: bool
    expert_share: float
    """Part of the routed experts one token uses; 0 for a dense model."""
    head_weights: int
    embedding_weights: int
    tower_weights: int
    active_linear_weights: int
    """Weights of the layers a token is multiplied with."""
    linears: int
    """Number of `nn.Linear` calls of one pass."""
    kernels: int
    """Other kernels of one eager forward pass through all layers."""
    mixing: tuple[Mixing, ...]

    @property
    def weights(self) -> int:
        """Everything that is loaded."""
        layers = self.linear_weights + self.other_weights + self.expert_weights
        return layers + self.head_weights + self.embedding_weights + self.tower_weights


def _weights(linears: Iterable[Linear | Parameter]) -> int:
    return sum(m.inputs * m.outputs for m in linears if isinstance(m, Linear))


def _rest(tensors: Iterable[Linear | Parameter | Norm]) -> int:
    return sum(t.outputs * t.bias if isinstance(t, Linear) else t.parameters for t in tensors)


def _dense_linears(layer: Layer) -> tuple[Linear, ...]:
    experts = layer.feed_forward.experts
    router = tuple(m for m in experts.router if isinstance(m, Linear)) if experts else ()
    return (*layer.attention.linears, *layer.feed_forward.linears, *layer.linears, *router)


def _other(layer: Layer) -> int:
    mixer, channel = layer.attention, layer.feed_forward
    tensors: list[Linear | Parameter | Norm] = [*_dense_linears(layer), *layer.norms, *layer.parameters]
    tensors += [*mixer.norms, *mixer.parameters, *channel.norms, *channel.parameters]
    if channel.experts:
        tensors += [m for m in channel.experts.router if not isinstance(m, Linear)]
    return _rest(tensors)


def _experts(layer: Layer) -> tuple[int, float]:
    """Weights of all routed experts of a layer, and the part of them a token uses."""
    experts = layer.feed_forward.experts
    if experts is None:
        return 0, 0.0
    return expert_count(experts), experts.per_token / experts.count


def _mixing(mixer: Attention, count: int) -> Mixing:
    if mixer.kind in ("recurrent", "none"):
        return Mixing(count, 0, 0, None, layer_kv_bytes(mixer, 1, 1, 2))
    features = mixer.head_dim + (mixer.value_dim or mixer.head_dim)
    return Mixing(count, 2 * mixer.heads * features, sum(token_elements(mixer)), mixer.window, 0)


def _kernels(layer: Layer, attention: str) -> int:
    """Kernels of one layer apart from its Linear calls."""
    mixer, channel = layer.attention, layer.feed_forward
    norms = (*layer.norms, *mixer.norms, *channel.norms)
    n = sum(_NORM_KERNELS[norm.kind] for norm in norms) + _RESIDUAL_KERNELS
    n += RECURRENT_KERNELS if mixer.kind == "recurrent" else _ATTENTION_KERNELS[attention]
    n += _ROPE_KERNELS if mixer.rope and mixer.kind != "recurrent" else 0
    n += 2 if channel.kind == "gated" else 1
    return n + (expert_kernels(channel.experts) if channel.experts else 0)


def expert_kernels(experts: Experts) -> int:
    """Kernels of the routed experts of one layer."""
    return _GROUPED_EXPERT_KERNELS if experts.fused else _EXPERT_KERNELS * experts.per_token


def _count(arch: Architecture) -> Work:
    repeats = [arch.order.count(kind) for kind in range(len(arch.kinds))]
    kinds = list(zip(repeats, arch.kinds, strict=True))
    dense = sum(n * _weights(_dense_linears(layer)) for n, layer in kinds)
    experts = [(n, *_experts(layer)) for n, layer in kinds]
    all_experts = sum(n * total for n, total, _ in experts)
    used = sum(n * total * share for n, total, share in experts)
    embeddings = sum(p.parameters for p in arch.embeddings)
    tied_head = arch.hidden_size * arch.vocab_size
    final_norm = arch.final_norm.parameters if arch.final_norm else 0
    outside = _rest((*arch.linears, *arch.parameters)) + final_norm
    outside_linears = _weights(arch.linears)
    return Work(
        layers=arch.layers,
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        linear_weights=dense + outside_linears,
        other_weights=sum(n * _other(layer) for n, layer in kinds) + outside,
        expert_weights=all_experts,
        experts_fused=any(e.fused for layer in arch.kinds if (e := layer.feed_forward.experts)),
        expert_share=used / all_experts if all_experts else 0.0,
        # A tied head reads the embedding, which is then counted here alone.
        head_weights=arch.head.parameters if arch.head else tied_head,
        embedding_weights=embeddings if arch.head else max(0, embeddings - tied_head),
        tower_weights=sum(map(tower_count, arch.towers)),
        active_linear_weights=dense + outside_linears + round(used),
        linears=sum(n * len(_dense_linears(layer)) for n, layer in kinds) + 1,
        kernels=sum(n * _kernels(layer, "sdpa") for n, layer in kinds) + 4,
        mixing=tuple(_mixing(layer.attention, n) for n, layer in kinds),
    )


count_work = identity_cache(_count)
"""`count_work(arch) -> Work`: the counts of a model, made once."""


@cache
def element_bytes(precision: str) -> float:
    """Bytes one weight takes in a precision of the catalogue, scales of rows left out."""
    return weight_bytes_per_parameter(load_precisions()[precision])


def linear_bytes(strategy: Strategy) -> float:
    """Bytes one weight of a quantizable Linear takes."""
    return element_bytes(strategy.dtype if strategy.quant == "none" else strategy.quant)


def expert_bytes(work: Work, strategy: Strategy) -> float:
    """Bytes one weight of a routed expert takes: fused stacks stay in the compute dtype unless asked for."""
    if not work.experts_fused:
        return linear_bytes(strategy)
    return element_bytes("nf4" if strategy.quant_experts == "nf4" else strategy.dtype)


def layer_bytes(work: Work, strategy: Strategy) -> float:
    """Bytes of all decoder layers as they are stored."""
    plain = element_bytes(strategy.dtype)
    experts = work.expert_weights * expert_bytes(work, strategy)
    return work.linear_weights * linear_bytes(strategy) + work.other_weights * plain + experts


def experts_read(work: Work, tokens: float) -> float:
    """Part of the routed experts that a pass over `tokens` tokens touches, routing taken as even."""
    if not work.expert_share:
        return 0.0
    untouched: float = (1 - work.expert_share) ** tokens
    return 1 - untouched


def read_bytes(work: Work, strategy: Strategy, tokens: float) -> float:
    """Weight bytes a forward pass over `tokens` tokens reads, head included and embedding rows left out."""
    idle = work.expert_weights * expert_bytes(work, strategy) * (1 - experts_read(work, tokens))
    return layer_bytes(work, strategy) - idle + work.head_weights * element_bytes(strategy.dtype)


def cache_bytes(work: Work, tokens: float, bytes_per_element: float) -> float:
    """Bytes of keys, values and recurrent state of one sequence with `tokens` tokens behind it."""
    kept = sum(m.count * m.cache_elements * m.context(tokens) for m in work.mixing) * bytes_per_element
    return kept + sum(m.count * m.state_bytes for m in work.mixing)


def repeated_cache_bytes(work: Work, tokens: float, bytes_per_element: float) -> float:
    """Bytes moved to write out grouped keys and values once for each query head and to read them again, as
    transformers does before attention with a mask (`repeat_kv` in integrations/sdpa_attention.py)."""
    repeated = (
        m.count * m.pair_flops / 2 * m.context(tokens)
        for m in work.mixing
        if m.pair_flops / 2 > m.cache_elements
    )
    return 2 * sum(repeated) * bytes_per_element


def attention_flops(work: Work, tokens: float) -> float:
    """Operations of attention for one query with `tokens` tokens in sight."""
    return sum(m.count * m.pair_flops * m.context(tokens) for m in work.mixing)


def quantized_weights(work: Work, strategy: Strategy) -> int:
    """Weights that are dequantized in each pass."""
    dense = work.linear_weights if strategy.quant != "none" else 0
    fused = strategy.quant_experts == "nf4" if work.experts_fused else strategy.quant != "none"
    return dense + (work.expert_weights if fused else 0)


def launches(work: Work, strategy: Strategy) -> int:
    """Kernels of one eager forward pass of inference."""
    per_linear = _LINEAR_KERNELS[strategy.quant]
    extra = _ATTENTION_KERNELS[strategy.attention] - _ATTENTION_KERNELS["sdpa"]
    return work.kernels + work.linears * per_linear + work.layers * extra
