"""Hostile and incomplete config.json: one line each, naming the field, and never anything but `BadConfig`."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiles.architecture import architecture
from profiles.arithmetic import parameter_count
from profiles.catalogue import all_models, load_model
from profiles.config import LARGEST_FILE_BYTES, load_config_file, read_config
from profiles.defaults import class_defaults, defaults_version
from profiles.errors import BadConfig
from profiles.fields import check_value

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "num_key_value_heads",
]
ABSURD = [-1, 0, 1.5, 4096.0, "x", "64", [], {}, 10**30, 10**8, True, False, math.nan, math.inf, [4], None]


def one_line(error: BadConfig) -> bool:
    lines = [str(error), error.hint or ""]
    return all("\n" not in line and len(line) < 300 for line in lines)


@pytest.mark.parametrize("value", ABSURD, ids=repr)
@pytest.mark.parametrize("field", SIZES)
def test_absurd_sizes_name_the_field(field: str, value: object) -> None:
    if value is None and field == "num_key_value_heads":
        return
    with pytest.raises(BadConfig) as caught:
        read_config({**LLAMA, field: value})
    assert field in str(caught.value) and one_line(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tie_word_embeddings", 1),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", None),
        ("hidden_act", 5),
        ("torch_dtype", "complex17"),
        ("torch_dtype", 16),
        ("dtype", ["bfloat16"]),
        ("architectures", 7),
        ("architectures", [7]),
        ("quantization_config", "int4"),
        ("quantization_config", {"quant_method": 4}),
        ("max_position_embeddings", -1),
        ("head_dim", 0),
    ],
)
def test_other_fields_of_wrong_kind(field: str, value: object) -> None:
    with pytest.raises(BadConfig) as caught:
        read_config({**LLAMA, field: value})
    assert field.split("_config")[0] in str(caught.value) and one_line(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 5, "num_key_value_heads": 2},
        {"num_attention_heads": 100, "hidden_size": 64, "num_key_value_heads": 100},
        {"num_hidden_layers": 10**5, "hidden_size": 10**7, "intermediate_size": 10**7},
        {"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 8},
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention"]},
        {"model_type": "qwen2_vl", "vision_config": {"depth": "x"}},
        {"model_type": "qwen2_vl", "vision_config": []},
        {"model_type": "llava", "text_config": {"model_type": "zzz"}},
        {"model_type": "llava", "text_config": {"model_type": 4}},
        {"model_type": "nemotron-nas", "block_configs": [{}]},
        {"model_type": "nemotron-nas", "block_configs": [3]},
        {"model_type": "siglip_vision_model"},
    ],
    ids=str,
)
def test_fields_that_do_not_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(BadConfig) as caught:
        read_config({**LLAMA, **changes})
    assert one_line(caught.value)


@pytest.mark.parametrize(
    "raw", [None, [], "x", 5, {}, {"model_type": None}, {"model_type": 5}, {"architectures": []}]
)
def test_what_is_no_config(raw: object) -> None:
    with pytest.raises(BadConfig) as caught:
        read_config(raw)
    assert one_line(caught.value)


def test_unknown_model_type_names_the_nearest_and_what_to_do() -> None:
    with pytest.raises(BadConfig) as caught:
        read_config({**LLAMA, "model_type": "qwen9"})
    assert caught.value.hint is not None and "qwen3" in caught.value.hint and "traits" in caught.value.hint
    start = time.perf_counter()
    with pytest.raises(BadConfig) as caught:
        read_config({**LLAMA, "model_type": "x" * 10**6})
    assert time.perf_counter() - start < 0.5 and one_line(caught.value)


def test_model_type_is_found_by_class_where_the_config_states_none() -> None:
    config = {k: v for k, v in load_model("internlm2.5-1.8b-chat").config.items() if k != "model_type"}
    assert parameter_count(architecture(config)) == 1_889_110_016


def test_missing_fields_take_transformers_defaults() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    arch = architecture(config)
    assert arch.kinds[0].attention.kv_heads == 4
    assert architecture({**LLAMA, "num_key_value_heads": None}) == arch
    bare = architecture({"model_type": "llama"})
    assert (bare.hidden_size, bare.layers, bare.vocab_size) == (4096, 32, 32000)
    assert class_defaults("llama").fields["intermediate_size"] == 11008
    assert defaults_version().split(".")[0] == "5"


def test_a_missing_field_without_default_is_named() -> None:
    config = {"model_type": "phi3small", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
    with pytest.raises(BadConfig, match="no ff_intermediate_size"):
        read_config({**config, "vocab_size": 128})


def test_facts_hold_what_the_reader_reads_and_no_more() -> None:
    noisy = {**LLAMA, "rope_theta": 1e6, "bos_token_id": 1, "_name_or_path": "/home/me", "use_cache": True}
    facts = read_config(noisy)
    assert facts == {**LLAMA}
    assert architecture(facts) == architecture(noisy)
    vision = load_model("qwen2.5-vl-7b-instruct").config
    assert read_config(vision) == vision


def test_nested_facts_are_kept_where_they_say_something() -> None:
    text = {"model_type": "gemma4_text", "num_hidden_layers": 2, "hidden_size_per_layer_input": 0}
    saved = {**text, "per_layer_config": {"1": {"head_dim": 128, "num_key_value_heads": 2}}}
    assert [layer.attention.head_dim for layer in architecture(saved).kinds] == [256, 128]
    assert read_config(saved) == saved
    bare = {"model_type": "gemma4", "text_config": text, "audio_config": {}}
    assert read_config(bare) == bare
    assert "model.audio_tower.layers" in [tower.name for tower in architecture(bare).towers]


def test_older_names_of_fields_are_read() -> None:
    base = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    counts = [
        parameter_count(architecture({**base, name: 16})) for name in ("num_experts", "num_local_experts")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\x00\x01\xff", b'{"a":' * 20000, b"[" * 200000,
        b'{"hidden_size": NaN}',
        b"\xff\xfe{}", b"1" * 10000, b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: ascii(content[:12]),
)  # fmt: skip
def test_malformed_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadConfig) as caught:
        read_config(load_config_file(tmp_path))
    assert one_line(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "big.json").write_bytes(b" " * (LARGEST_FILE_BYTES + 1))
    for path in (
        tmp_path,
        tmp_path / "none.json",
        tmp_path / "big.json",
        "\0",
        "x" * 5000,
        tmp_path / "big.json" / "x",
    ):
        with pytest.raises(BadConfig) as caught:
            load_config_file(path)
        assert one_line(caught.value)


def test_infinity_in_a_published_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "time_step_limit": [0.0, math.inf]}))
    assert read_config(load_config_file(tmp_path / "config.json")) == LLAMA


def test_unknown_kinds_are_a_mistake_of_ours() -> None:
    with pytest.raises(LookupError):
        check_value("x", 1, "sizable")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
CONFIGS = [profile.config for profile in all_models()]


@st.composite
def broken_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A catalogued config with one to three fields, at any depth, replaced or taken away."""
    config: Any = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 3))):
        at = config
        while True:
            name = draw(st.sampled_from(sorted(at))) if at else None
            if name is None or not isinstance(at[name], dict) or draw(st.booleans()):
                break
            at = at[name]
        if name is None:
            continue
        if draw(st.booleans()):
            at[name] = draw(json_values)
        else:
            del at[name]
    return dict(config)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(broken_configs())
def test_fuzzed_configs_are_read_or_refused(config: dict[str, Any]) -> None:
    try:
        facts = read_config(config)
    except BadConfig as error:
        assert one_line(error)
        return
    assert parameter_count(architecture(facts)) == parameter_count(architecture(config)) > 0


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA, "text_config", "vision_config", "layer_types"]), json_values))
def test_fuzzed_objects_are_read_or_refused(config: dict[str, Any]) -> None:
    try:
        read_config(config)
    except BadConfig as error:
        assert one_line(error)
