"""Quantizing fused experts while transformers' loader reads them, one expert at a time.

A checkpoint has one tensor per expert and projection; the loader would put all of a layer together in 16 bits
before any is quantized. Here one expert after the other is read, put together and packed, so what stands on
the device beside the packed weights is one expert's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from executor.errors import BadWeights, CannotHonour
from executor.packed_experts import adopt_experts, is_stack, pack
from executor.random_weights import LazyStack

_KEY = "bitsandbytes_4bit"


@contextmanager
def packing_experts() -> Iterator[None]:
    """Within, models that transformers quantizes to 4 bits have their fused experts quantized, too.

    Errors, from the loader: `CannotHonour` for a model whose experts cannot be, `BadWeights` for stacks of
    other shapes than the model's.
    """
    stock = AUTO_QUANTIZER_MAPPING[_KEY]
    AUTO_QUANTIZER_MAPPING[_KEY] = _Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_KEY] = stock


class _Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' 4-bit quantizer that takes stacks of experts for quantizable, too."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        if not adopt_experts(model):
            raise CannotHonour(
                f"transformers runs the experts of {type(model).__name__} in code of its own, which takes no "
                "quantized ones",
                "plan with `--quant-experts none`",
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return is_stack(model, param_name) or bool(
            super().param_needs_quantization(model, param_name, **kwargs)
        )

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        found = super().update_weight_conversions(weight_conversions, *args)
        for entry in found:
            if type(entry) is WeightConverter and _goes_expert_by_expert(entry):
                entry.__class__ = _ExpertByExpert
        return found


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    """Packs stacks that come whole, and leaves the rest to bitsandbytes."""

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
        result = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not is_stack(model, name):
                result |= super().convert({name: value}, *args, model=model, **kwargs)
                continue
            weights = tensor.experts() if isinstance(tensor, LazyStack) else iter(tensor)
            result[name] = _packed(model, name, weights, tensor.shape[0])
        return result


def _goes_expert_by_expert(converter: WeightConverter) -> bool:
    """Do its operations put experts side by side and treat each by itself?"""
    first, *rest = converter.operations
    if not (isinstance(first, MergeModulelist) and first.dim == 0):
        return False
    return all(
        (isinstance(op, Concatenate) and op.dim != 0)
        or (isinstance(op, Transpose) and 0 not in (op.dim0, op.dim1))
        for op in rest
    )


class _ExpertByExpert(WeightConverter):  # type: ignore[misc]
    """A converter that is run once for every expert, where its target is a stack to be packed."""

    __slots__ = ()

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        waiting = dict(self.collected_tensors)
        counts = {len(tensors) for tensors in waiting.values()}
        if self.quantization_operation is None or not is_stack(model, layer_name) or len(counts) != 1:
            return dict(super().convert(layer_name, model=model, **kwargs))
        experts = counts.pop()
        self.quantization_operation = None
        weights = (self._one(index, waiting, layer_name, model, kwargs) for index in range(experts))
        return {layer_name: _packed(model, layer_name, weights, experts)}

    def _one(self, index: int, waiting: Any, layer_name: str, model: Any, kwargs: Any) -> torch.Tensor:
        """The weight of expert `index`: what the operations make of a stack of one."""
        for pattern, tensors in waiting.items():
            self.collected_tensors[pattern] = [tensors[index]]
        (stack,) = super().convert(layer_name, model=model, **kwargs).values()
        weight: torch.Tensor = stack[0]
        return weight


def _packed(model: Any, name: str, weights: Iterator[torch.Tensor], experts: int) -> Any:
    """The packed stack of `experts` weights. Errors: `BadWeights` where the model's has another shape."""
    wanted = tuple(model.get_parameter(name).shape)

    def checked() -> Iterator[torch.Tensor]:
        for weight in weights:
            shape = (experts, *weight.shape)
            if shape != wanted:
                there, asked = ("x".join(map(str, each)) for each in (shape, wanted))
                raise BadWeights(
                    f"{name} has the shape {there} and config.json asks for {asked}",
                    "config.json or the weights are of another model; download both again",
                )
            yield weight
            del weight

    return pack(checked(), experts, model.get_submodule(name.rpartition(".")[0]).is_transposed)
