"""Every tensor, by name and shape, against the classes transformers builds on the meta device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from profiles.catalogue import all_models
from profiles.defaults import described_by_transformers
from profiles.errors import BadConfig
from profiles.facts import language_model_types
from profiles.schema import ModelProfile

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compare_with_transformers import build, differences  # noqa: E402
from config_variants import variants  # noqa: E402

pytestmark = pytest.mark.executor

KINDS = ["sliding_attention", "full_attention"] * 2
CHANGES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "aya_vision": {"vision_config": {"num_attention_heads": 8}},
    "cohere2_vision": {"alignment_intermediate_size": 48},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": KINDS, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": KINDS, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
    "internvl": {"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "ministral": {"head_dim": 12},
    "nemotron": {"head_dim": 12},
    "nemotron_h": {"moe_latent_size": 12},
}
NOT_BUILT = {
    "gemma3n",  # its vision tower is a timm model
    "glm4v_text", "glm4v_moe_text", "mllama_text_model", "muse_glimmer_text", "qwen2_5_vl_text",
    "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text", "step3p5",  # built inside their wrapper alone
}  # fmt: skip
COMPARED = sorted({*language_model_types()} & {*described_by_transformers()} - NOT_BUILT)


def accepted(model_type: str, count: int | None) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Variants that the class itself builds: the small config, then up to `count` more, spread evenly."""
    found = list(variants(model_type, CHANGES.get(model_type)))
    first, rest = found[0], found[1:]
    step = 1 if count is None else max(1, len(rest) // count)
    for name, config in [first, *rest[::step]]:
        try:
            yield name, config, build(config)
        except Exception:
            assert name != first[0], f"the class refuses the small config of {model_type}"


def disagreements(model_type: str, count: int | None) -> dict[str, list[str]]:
    """Lines of difference by variant; a config that only we refuse counts where no size of it is null."""
    found = {}
    for name, config, model in accepted(model_type, count):
        try:
            lines = list(differences(config, model))
        except BadConfig as error:
            refused = name.endswith("=None") or "is None" in str(error) or "evenly" in str(error)
            lines = [] if refused else [str(error)]
        if lines:
            found[name] = lines[:5]
    return found


@pytest.mark.parametrize("model_type", COMPARED)
def test_small_configs_agree(model_type: str) -> None:
    assert disagreements(model_type, 8) == {}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMPARED)
def test_every_flag_and_size_agrees(model_type: str) -> None:
    assert disagreements(model_type, None) == {}


BUILT = [profile for profile in all_models() if profile.config["model_type"] in COMPARED]


@pytest.mark.slow
@pytest.mark.parametrize("profile", BUILT, ids=lambda profile: profile.id)
def test_profiles_build_to_the_recorded_count(profile: ModelProfile) -> None:
    model = build(profile.config)
    assert sum(p.numel() for p in model.parameters()) == profile.parameters
    assert list(differences(profile.config, model)) == []
