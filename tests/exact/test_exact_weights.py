"""Weights as loaded: the fast estimator against the modules that transformers and bitsandbytes make.

Both count every tensor, so they agree to the allocator's rounding of the smallest ones. Held here is what no
config field says: which linears bitsandbytes leaves alone, which buffers lie beside the parameters, and of
which models `AutoModelForCausalLM` builds the text model alone.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [executor] extra")

from planner.errors import BadConfig
from planner.exact import build
from planner.exact.trace import _weight_bytes
from planner.memory.weights import weight_bytes
from planner.types import Strategy
from profiles.architecture import loaded_architecture
from profiles.catalogue import all_models, load_model

pytestmark = pytest.mark.executor

TELLING = {
    "subclasses of nn.Linear": "falcon-7b",
    "a router that is a Linear": "phi-3.5-moe-instruct",
    "linears the class keeps in float32": "deepseek-v3.2",
    "towers that are not built": "qwen3.5-0.8b",
    "towers that are": "gemma-4-e2b-it",
}
BUFFERS = ("codegen", "gpt_bigcode", "gpt_neo", "gptj", "xglm")
ONE_OF_EACH = {model.config["model_type"]: model.id for model in all_models()}


def counted(config: dict[str, Any], quant: str) -> tuple[int, int]:
    """Loaded bytes (fast, real). Errors: `BadConfig` where transformers has no such class."""
    how = Strategy(quant=quant)
    with build.quiet():
        model = build.build_model(build.load_config(config), how)
        build.quantize(model, how, 2048)
    arch = loaded_architecture(config)
    fast = weight_bytes(arch, quant, "none", how.dtype).counted(arch.order)
    return fast, _weight_bytes(model, lambda name: 1)


@pytest.mark.parametrize("id", TELLING.values(), ids=TELLING.keys())
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_what_no_field_of_the_config_says(id: str, quant: str) -> None:
    fast, real = counted(load_model(id).config, quant)
    assert fast == pytest.approx(real, rel=1e-5)


@pytest.mark.parametrize("model_type", BUFFERS)
def test_buffers_that_no_checkpoint_holds(model_type: str) -> None:
    from transformers import AutoConfig

    config = json.loads(json.dumps(AutoConfig.for_model(model_type).to_dict(), default=str))
    fast, real = counted(config, "none")
    assert fast == pytest.approx(real, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("id", ONE_OF_EACH.values())
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_one_model_of_every_type(id: str, quant: str) -> None:
    try:
        fast, real = counted(load_model(id).config, quant)
    except BadConfig:
        pytest.skip("not a class of transformers")
    assert fast == pytest.approx(real, rel=1e-4)
