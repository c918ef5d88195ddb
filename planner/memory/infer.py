"""Memory of generation on one card: load, prefill, decode.

Prefill runs the whole prompt through the layers and asks for the last position's logits only
(`generation/utils.py`, logits_to_keep=1). Python keeps the embeddings and each layer's input alive while
the layer runs. Decode grows the cache one token at a time.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec.structs import replace

from planner.memory.attention import input_bytes
from planner.memory.kvcache import CacheBytes, cache_bytes, filled_bytes
from planner.memory.layer import layer_cost
from planner.memory.moments import CardMemory, line, snapshot
from planner.memory.shapes import Pass, habits
from planner.memory.tape import rounded
from planner.memory.weights import WIDTH, layer_linears, load_transient_bytes, stored_as, weight_bytes
from planner.types import MemoryLine, Strategy, Workload
from profiles.schema import Architecture, Attention

CHECKED_TOKENS = 64
"""Most tokens of a pass that checks a draft, the token before the draft counted in."""


def prefill_pass(arch: Architecture, work: Workload, how: Strategy) -> Pass:
    """Shapes and numerics of the prompt's forward pass; of the last and largest one of a prompt in parts,
    which sdpa takes with a mask."""
    width = WIDTH[how.dtype]
    chunk = how.prefill_chunk_tokens or work.prompt_tokens
    past = max(0, work.prompt_tokens - chunk)
    return Pass(
        batch=work.sequences,
        seq=work.prompt_tokens - past,
        past=past,
        masked=past > 0,
        width=width,
        stream=width,
        quant=how.quant,
        packed_experts=how.quant_experts != "none",
        attention=how.attention,
        cache=how.cache,
        **habits(arch.model_type, False),
        liger=False,
    )


@lru_cache(maxsize=1024)
def inference_memory(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> CardMemory:
    """All moments of a generation run. `workspace`: bytes of one cuBLAS workspace on this card."""
    p = prefill_pass(arch, work, how)
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    load = weights.total(arch.order)
    batch, width = work.sequences, p.width
    tokens = work.prompt_tokens + work.new_tokens
    lasting = (
        line(
            "weights",
            load,
            f"{arch.layers} layers + embeddings + head, {stored_as(arch, how)}",
        ),
        line("library workspace", workspace, "cuBLAS", "measured"),
    )
    checked = 1 if how.speculate == "none" else CHECKED_TOKENS
    one = decode_pass(p, tokens, checked)
    fixed = (*lasting, _inputs(arch, p, tokens))
    kv = cache_bytes(arch, batch, work.prompt_tokens, tokens, width, how.cache)
    stream = rounded(p.tokens * arch.hidden_size * p.stream)
    logits = rounded(batch * arch.vocab_size * (width + 4))
    # assisted generation keeps the float32 logits of a pass twice: as they came and as they are processed
    judged = logits if checked == 1 else rounded(batch * checked * arch.vocab_size * (width + 8))
    worst, others = _fullest(arch, p, kv)
    worst += _beside_part(arch, p, kv)
    hidden = 2 * stream
    if p.embeddings in ("positioned", "placed"):
        hidden += stream // (work.sequences if p.embeddings == "positioned" else 1)
    step = max(layer_cost(layer, one, arch.hidden_size).forward_peak for layer in arch.kinds)
    if how.cache == "static":
        step += max(_repeated_bytes(layer.attention, batch * tokens * width) for layer in arch.kinds)
    shots = [
        snapshot(
            "prefill",
            (
                *fixed,
                line(
                    "kv cache",
                    others,
                    f"{how.cache}: {batch} x {work.prompt_tokens} tokens, beside the layer in work",
                ),
                line("activations", hidden, "embeddings and the layer's input"),
                line(
                    "layer in work",
                    worst,
                    "largest set of tensors alive inside one layer",
                    "modelled",
                ),
            ),
            rounded(p.tokens * _widest(arch) * width),
        ),
        snapshot(
            "prefill",
            (
                *fixed,
                line("kv cache", kv.prefill, f"{how.cache}: {batch} x {work.prompt_tokens} tokens"),
                line("activations", 2 * stream, "embeddings and the last hidden state"),
                line("layer in work", 5 * stream, "final norm in float32", "modelled"),
                line("logits", logits, f"{batch} x {arch.vocab_size}, last position"),
            ),
        ),
        snapshot(
            "decode",
            (
                *lasting,
                _inputs(arch, one, tokens),
                # the first token finds what the prompt left, the last one all
                line("kv cache", max(kv.prefill, kv.final), f"{how.cache}: {batch} x {tokens} tokens"),
                line("kv copy", kv.growth, "one layer's cache, copied or unpacked when it grows"),
                line("layer in work", step, f"{_tokens(checked)} through one layer", "modelled"),
                line("logits", judged, f"{batch * checked} x {arch.vocab_size}"),
            ),
        ),
    ]
    return CardMemory(
        load_bytes=load,
        load_peak_bytes=load + load_transient_bytes(weights, how.quant),
        managed_bytes=0,
        host_bytes=kv.host,
        dequantized_bytes=weights.largest_unquantized if how.quant != "none" else 0,
        snapshots=tuple(shots),
    )


def _inputs(arch: Architecture, p: Pass, tokens: int) -> MemoryLine:
    return line("inputs and rope", input_bytes(arch, p, tokens), "token ids, mask, cos and sin tables")


def _fullest(arch: Architecture, p: Pass, cache: CacheBytes) -> tuple[int, int]:
    """(bytes in work, bytes of cache beside it) at the layer where the prompt's pass holds most.

    A growing cache fills layer by layer, and the tape counts what the layer in work adds; a recurrent state
    is there before its layer runs. The parts of a prompt find the cache of those before them. An offloaded
    cache leaves the card behind each layer; while the last one runs, the first is on its way back.
    """
    costs = [layer_cost(layer, p, arch.hidden_size).forward_peak for layer in arch.kinds]
    if p.cache == "static" or p.past:
        return max(costs), cache.prefill
    assert p.cache
    recurrent = [layer.attention.kind == "recurrent" for layer in arch.kinds]
    owned = [filled_bytes(layer.attention, p.batch, p.seq, p.width, p.cache) for layer in arch.kinds]
    filled, best = 0, (0, 0)
    last = len(arch.order) - 1
    for i, kind in enumerate(arch.order):
        filled += owned[kind] if recurrent[kind] else 0
        back = owned[arch.order[0]] if p.cache == "offloaded" and i == last and last else 0
        best = max(best, (costs[kind], filled + back), key=sum)
        filled += owned[kind] if not recurrent[kind] and p.cache != "offloaded" else 0
    return best


def decode_pass(p: Pass, tokens: int, checked: int = 1) -> Pass:
    """The last decode pass: over one token, or over the `checked` ones of a draft, which come with a mask."""
    checked = min(checked, tokens)
    return replace(p, seq=checked, past=tokens - checked, masked=checked > 1)


def _beside_part(arch: Architecture, p: Pass, kv: CacheBytes) -> int:
    """What a part of a prompt needs beside its own tensors, for those before it: a layer's cache is copied as
    it grows, and its keys and values for every query head, since a part comes with a mask."""
    if not p.past:
        return 0
    repeated = max(_repeated_bytes(layer.attention, p.batch * p.past * p.width) for layer in arch.kinds)
    return max(kv.growth, repeated)


def _tokens(count: int) -> str:
    return "one token" if count == 1 else f"{count} tokens"


def _repeated_bytes(spec: Attention, token_bytes: int) -> int:
    """Keys and values copied for every query head: a static cache always comes with a mask, which sdpa does
    not take together with grouped heads (`integrations/sdpa_attention.py`)."""
    if spec.kind in ("none", "recurrent") or spec.heads == (spec.kv_heads or spec.heads):
        return 0
    value = spec.value_dim or spec.head_dim
    return rounded(token_bytes * spec.heads * spec.head_dim) + rounded(token_bytes * spec.heads * value)


def _widest(arch: Architecture) -> int:
    """Features of the widest activation, a token's expert copies counted together."""
    widths = [arch.hidden_size]
    for layer in arch.kinds:
        widths += [item.outputs for item in layer_linears(layer)]
        experts = layer.feed_forward.experts
        if experts is not None:
            widths.append(experts.per_token * max(2 * experts.intermediate, arch.hidden_size))
    return max(widths)
