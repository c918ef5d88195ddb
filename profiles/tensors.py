"""Every tensor of an architecture by the name transformers gives it."""

from __future__ import annotations

from collections.abc import Iterator

from profiles.schema import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    Layer,
    Linear,
    Norm,
    Parameter,
    Tower,
)

Tensor = tuple[str, tuple[int, ...]]


def linear_tensors(linear: Linear) -> Iterator[Tensor]:
    """Weight and bias of a linear."""
    shape = (linear.outputs, linear.inputs)
    yield f"{linear.name}.weight", shape[::-1] if linear.transposed else shape
    if linear.bias:
        yield f"{linear.name}.bias", (linear.outputs,)


def norm_tensors(norm: Norm) -> Iterator[Tensor]:
    """Weight and bias of a norm."""
    if norm.weight:
        yield f"{norm.name}.weight", (norm.size,)
    if norm.bias:
        yield f"{norm.name}.bias", (norm.size,)


def _own(
    linears: tuple[Linear, ...], norms: tuple[Norm, ...], parameters: tuple[Parameter, ...]
) -> Iterator[Tensor]:
    for linear in linears:
        yield from linear_tensors(linear)
    for norm in norms:
        yield from norm_tensors(norm)
    for parameter in parameters:
        if parameter.persistent:
            yield parameter.name, parameter.shape


def _experts(experts: Experts) -> Iterator[Tensor]:
    for part in experts.router:
        if isinstance(part, Linear):
            yield from linear_tensors(part)
        else:
            yield part.name, part.shape
    for parameter in experts.parameters:
        yield parameter.name, parameter.shape
    for n in range(0 if experts.fused else experts.count):
        for linear in experts.linears:
            for name, shape in linear_tensors(linear):
                yield name.replace("{n}", str(n)), shape


def layer_tensors(layer: Layer) -> Iterator[Tensor]:
    """Tensors of one decoder layer, named inside the layer."""
    yield from _mixer(layer.attention)
    yield from _mixer(layer.feed_forward)
    if layer.feed_forward.experts is not None:
        yield from _experts(layer.feed_forward.experts)
    yield from _own(layer.linears, layer.norms, layer.parameters)


def _mixer(mixer: Attention | FeedForward) -> Iterator[Tensor]:
    yield from _own(mixer.linears, mixer.norms, mixer.parameters)


def tower_tensors(tower: Tower) -> Iterator[Tensor]:
    """Tensors of an encoder and its projector."""
    for i in range(tower.blocks):
        for name, shape in _own(tower.block_linears, (), tower.block_parameters):
            yield f"{tower.name}.{i}.{name}", shape
    yield from _own(tower.linears, (), tower.parameters)


def named_tensors(arch: Architecture) -> Iterator[Tensor]:
    """Name and shape of every tensor of a checkpoint, in module order where the architecture keeps it."""
    yield from _own((), (), arch.embeddings)
    for i, kind in enumerate(arch.order):
        for name, shape in layer_tensors(arch.kinds[kind]):
            yield f"{arch.layers_path}.{i}.{name}", shape
    if arch.final_norm is not None:
        yield from norm_tensors(arch.final_norm)
    if arch.head is not None:
        yield from linear_tensors(arch.head)
    yield from _own(arch.linears, (), arch.parameters)
    for tower in arch.towers:
        yield from tower_tensors(tower)


def linear_names(arch: Architecture) -> Iterator[str]:
    """Module path of every `nn.Linear` of the text model, the head last."""
    for i, kind in enumerate(arch.order):
        layer = arch.kinds[kind]
        experts = layer.feed_forward.experts
        for linear in (*layer.attention.linears, *layer.feed_forward.linears, *layer.linears):
            yield f"{arch.layers_path}.{i}.{linear.name}"
        if experts is None:
            continue
        for part in experts.router:
            if isinstance(part, Linear):
                yield f"{arch.layers_path}.{i}.{part.name}"
        for n in range(0 if experts.fused else experts.count):
            for linear in experts.linears:
                yield f"{arch.layers_path}.{i}.{linear.name.replace('{n}', str(n))}"
    for linear in arch.linears:
        yield linear.name
    if arch.head is not None:
        yield arch.head.name
