"""Hold `architecture(config)` against the class transformers builds, tensor by tensor.

    python tools/compare_with_transformers.py llama '{"num_hidden_layers": 2}' ...
    python tools/compare_with_transformers.py path/to/config.json ...

Prints `ok` or the tensors that differ: only in the class (+), only in ours (-), of another shape (~), and
modules that are `nn.Linear` on one side only (L).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.pytorch_utils import Conv1D

from profiles.architecture import architecture
from profiles.schema import Architecture
from profiles.tensors import linear_names, named_tensors


def build(config: Mapping[str, Any]) -> torch.nn.Module:
    """The real class on the meta device."""
    values = dict(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        if type(made) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText.from_config(made)
        return AutoModelForCausalLM.from_config(made)


def real_tensors(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters (tied ones once) and persistent buffers of the class."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(shapes)
    for name, value in model.state_dict().items():
        if name not in shapes and name not in tied:
            shapes[name] = tuple(value.shape)
    return shapes


def differences(config: Mapping[str, Any], model: torch.nn.Module | None = None) -> Iterator[str]:
    """One line for each tensor on which we and the class disagree."""
    model, ours = model or build(config), architecture(config)
    real, counted = real_tensors(model), dict(named_tensors(ours))
    for name in sorted(real.keys() | counted.keys()):
        if name not in counted:
            yield f"+ {name} {real[name]}"
        elif name not in real:
            yield f"- {name} {counted[name]}"
        elif real[name] != counted[name] and not (
            len(counted[name]) == 1 and prod(real[name]) == counted[name][0]
        ):
            yield f"~ {name} real {real[name]} ours {counted[name]}"
    yield from linear_differences(model, ours)


def linear_differences(model: torch.nn.Module, ours: Architecture) -> Iterator[str]:
    """Modules of the text model that only one side calls linear."""
    towers = tuple(tower.name for tower in ours.towers)
    declared = set(linear_names(ours))
    for tower in ours.towers:
        declared |= {linear.name for linear in tower.linears}
        declared |= {f"{tower.name}.{i}.{x.name}" for i in range(tower.blocks) for x in tower.block_linears}
    real = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    for name in sorted(declared ^ real):
        if name in real and ours.head is None and model.get_submodule(name) is model.get_output_embeddings():
            continue
        side = "in the class only" if name in real else "ours only"
        yield f"L {name} {side}{' (tower)' if name.startswith(towers) else ''}"


def main(arguments: list[str]) -> int:
    """Compare each named config; 1 if any differs."""
    failed = False
    while arguments:
        first = arguments.pop(0)
        if first.endswith(".json"):
            config = json.loads(Path(first).read_text())
        else:
            config = json.loads(arguments.pop(0)) if arguments and arguments[0].startswith("{") else {}
            config["model_type"] = first
        found = list(differences(config))
        failed |= bool(found)
        print(first, "ok" if not found else f"{len(found)} differences", *found[:60], sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
