"""What a model's memory is made of: weights by group, bytes a token adds to the cache, bytes of one layer.

The same functions the estimate is made of, added up another way: the groups' bytes are the loaded bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from planner.memory.infer import prefill_pass
from planner.memory.kvcache import layer_kv_bytes, token_elements
from planner.memory.layer import through
from planner.memory.tape import rounded
from planner.memory.train import training_pass
from planner.memory.weights import WIDTH, expert_bytes, linear_bytes, norm_bytes, parameter_bytes, tower_bytes
from planner.types import Strategy, Workload
from profiles.arithmetic import tower_count
from profiles.schema import Architecture, Experts, Layer, Linear, Norm, Parameter

Group = Literal["embeddings", "attention", "MLP", "experts", "norms", "head", "other", "towers"]


class WeightGroup(Struct, frozen=True):
    """Loaded weights of one kind."""

    group: Group
    parameters: int
    bytes: int
    note: str = ""


class CacheRate(Struct, frozen=True):
    """What the KV cache takes of the card in a compute dtype, unquantized."""

    bytes_per_token: int
    """Of one sequence, all layers together, up to the smallest window."""
    windows: dict[int, int]
    """Tokens kept at most -> layers that keep no more."""
    constant_bytes: int
    """Of one sequence, whatever its length: states of recurrent layers."""
    formula: str


class LayerBytes(Struct, frozen=True):
    """One kind of layer at work, for the whole batch."""

    layers: int
    attention: str
    input: int
    """The residual stream that enters it: what a checkpoint keeps."""
    saved: int
    """What autograd keeps of it without checkpointing; 0 when nothing is trained."""
    forward_peak: int
    backward_peak: int
    """With checkpointing: recomputation and backward. 0 when nothing is trained."""


class _Sum:
    """Adds tensors up to a group."""

    def __init__(self, quant: str, width: int) -> None:
        self.quant, self.width = quant, width
        self.parameters = self.bytes = 0

    def add(self, tensors: Iterable[Linear | Parameter | Norm], times: int = 1) -> None:
        for item in tensors:
            if isinstance(item, Linear):
                n = linear_bytes(item, self.quant, self.width)
            elif isinstance(item, Norm):
                n = norm_bytes(item, self.width)
            else:
                n = parameter_bytes(item, self.width)
            self.bytes += times * n
            self.parameters += times * item.parameters


def weight_groups(arch: Architecture, how: Strategy) -> tuple[WeightGroup, ...]:
    """Loaded weights by group; their bytes add up to `load_bytes`."""
    width = WIDTH[how.dtype]
    inner: tuple[Group, ...] = ("attention", "MLP", "experts", "norms", "other")
    sums = {name: _Sum(how.quant, width) for name in inner}
    for index, layer in enumerate(arch.kinds):
        _add_layer(sums, layer, arch.order.count(index), how, width)
    sums["norms"].add((arch.final_norm,) if arch.final_norm else ())
    sums["other"].add((*arch.linears, *arch.parameters))
    embeddings = _Sum("none", width)
    embeddings.add(arch.embeddings)
    stored = how.quant if how.quant != "none" else how.dtype
    groups = [WeightGroup("embeddings", embeddings.parameters, embeddings.bytes, how.dtype)]
    notes = {"attention": stored, "MLP": stored, "experts": _experts_note(arch, how), "norms": how.dtype}
    groups += [
        WeightGroup(name, sums[name].parameters, sums[name].bytes, notes.get(name, "")) for name in inner
    ]
    groups.append(_head(arch, how, width))
    towers = sum(tower_bytes(tower, how.quant, width) for tower in arch.towers)
    groups.append(WeightGroup("towers", sum(map(tower_count, arch.towers)), towers, "vision, audio"))
    return tuple(group for group in groups if group.bytes or group.group == "head")


def _add_layer(sums: dict[Group, _Sum], layer: Layer, times: int, how: Strategy, width: int) -> None:
    mixer, channels = layer.attention, layer.feed_forward
    sums["attention"].add((*mixer.linears, *mixer.parameters), times)
    sums["MLP"].add((*channels.linears, *channels.parameters), times)
    sums["norms"].add((*layer.norms, *mixer.norms, *channels.norms), times)
    sums["other"].add((*layer.linears, *layer.parameters), times)
    if channels.experts is not None:
        part = sums["experts"]
        part.bytes += times * expert_bytes(channels.experts, how.quant, how.quant_experts, width)
        part.parameters += times * _expert_parameters(channels.experts)


def _expert_parameters(experts: Experts) -> int:
    stacked = sum(item.parameters for item in experts.parameters)
    single = 0 if experts.fused else experts.count * sum(item.parameters for item in experts.linears)
    return stacked + single + sum(item.parameters for item in experts.router)


def _experts_note(arch: Architecture, how: Strategy) -> str:
    found = [layer.feed_forward.experts for layer in arch.kinds if layer.feed_forward.experts is not None]
    if not found:
        return ""
    stored = how.quant_experts if found[0].fused else how.quant
    return f"{found[0].count} a layer, {found[0].per_token} used; {how.dtype if stored == 'none' else stored}"


def _head(arch: Architecture, how: Strategy, width: int) -> WeightGroup:
    if arch.head is None:
        return WeightGroup("head", 0, 0, "shares the embedding's weight")
    n = rounded(arch.head.parameters * width)
    return WeightGroup("head", arch.head.parameters, n, f"{how.dtype}, never quantized")


def cache_rate(arch: Architecture, how: Strategy) -> CacheRate:
    """KV cache of one sequence, by token."""
    width = WIDTH[how.dtype]
    elements, windows, constant = 0, dict[int, int](), 0
    shapes: dict[str, int] = {}
    for index, layer in enumerate(arch.kinds):
        times, mixer = arch.order.count(index), layer.attention
        if mixer.kind == "recurrent":
            constant += times * layer_kv_bytes(mixer, 1, 1, width)
            continue
        per_token = token_elements(mixer)
        elements += times * sum(per_token)
        if mixer.window is not None:
            windows[mixer.window] = windows.get(mixer.window, 0) + times
        if per_token:
            shape = " + ".join(map(str, per_token))
            shapes[shape] = shapes.get(shape, 0) + times
    parts = [f"{times} layers x ({shape}) x {width} B" for shape, times in shapes.items()]
    return CacheRate(elements * width, dict(sorted(windows.items())), constant, " + ".join(parts) or "none")


def layers_at_work(arch: Architecture, work: Workload, how: Strategy) -> tuple[LayerBytes, ...]:
    """Each kind of layer with the bytes of its pass over the whole batch."""
    train = work.task == "train"
    p = training_pass(arch, work, how) if train else prefill_pass(arch, work, how)
    layers = through(arch, p)
    found: dict[tuple[str, int, int, int, int], int] = {}
    for kind, cost, stream in zip(arch.order, layers.costs, layers.inputs, strict=True):
        back = cost.recompute_peak if how.gradient_checkpointing else cost.backward_peak
        key = (_mixer(arch.kinds[kind]), stream, cost.saved, cost.forward_peak, back)
        found[key] = found.get(key, 0) + 1
    return tuple(
        LayerBytes(times, name, stream, saved if train else 0, forward, back if train else 0)
        for (name, stream, saved, forward, back), times in found.items()
    )


def _mixer(layer: Layer) -> str:
    window = f" of {layer.attention.window}" if layer.attention.window else ""
    return f"{layer.attention.kind}{window}"
