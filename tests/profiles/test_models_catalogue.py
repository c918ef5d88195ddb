"""Every profile: its own arithmetic gives the recorded count, and every spelling finds it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from profiles.architecture import architecture
from profiles.arithmetic import active_parameter_count, parameter_count, part_counts
from profiles.catalogue import all_models, load_model, model_ids, profile_from_config
from profiles.config import read_config
from profiles.errors import UnknownModel
from profiles.names import model_id, nearest, stem
from profiles.schema import ModelProfile

FOLDER = Path(__file__).parents[2] / "profiles" / "models"
PROFILES = all_models()
UNVERIFIED = {"deepseek-llm-7b-chat", "glm-4v-9b", "kimi-k3", "minicpm3-4b", "qwen-vl-chat"}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.id)
def test_arithmetic_gives_the_recorded_count(profile: ModelProfile) -> None:
    arch = architecture(profile.config)
    counts = part_counts(arch)
    assert parameter_count(arch) == counts.total == profile.parameters
    active = active_parameter_count(arch)
    assert 0 < active <= profile.parameters
    assert (profile.active_parameters is not None) == (counts.experts > 0)
    if profile.active_parameters is not None:
        assert profile.active_parameters == active < profile.parameters
    assert len(arch.order) == arch.layers and set(arch.order) == set(range(len(arch.kinds)))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.id)
def test_profile_states_where_it_comes_from(profile: ModelProfile) -> None:
    assert (FOLDER / profile.family / f"{profile.id}.json").is_file()
    assert profile.id == profile.id.lower() == model_id(profile.repo_ids[0])
    assert profile.sources and all(source.what for source in profile.sources)
    assert (profile.verification.note is None) == (profile.verification.status == "exact")
    assert profile.context_tokens is None or 512 <= profile.context_tokens <= 2**24
    assert profile.config["model_type"] and read_config(profile.config) == profile.config


def test_catalogue_is_complete_and_unverified_entries_are_known() -> None:
    assert len(model_ids()) == len(PROFILES) == 245
    assert {p.id for p in PROFILES if p.verification.status == "unverified"} == UNVERIFIED


def test_reading_every_profile_is_fast() -> None:
    from profiles import catalogue

    catalogue._read.cache_clear()
    start = time.perf_counter()
    all_models()
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-7b", "qwen2.5-7b"),
        ("QWEN2.5-7B", "qwen2.5-7b"),
        ("qwen2.5-7b-instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("qwen/qwen2.5-7b-instruct", "qwen2.5-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Qwen/Qwen2-7B", "qwen2-7b-instruct"),
        ("mistral-7b-v0.3", "mistral-7b-instruct-v0.3"),
        ("google/gemma-3-4b-pt", "gemma-3-4b-it"),
        ("internlm/internlm2_5-7b-chat", "internlm2.5-7b-chat"),
        (" gemma-2-2b ", "gemma-2-2b"),
    ],
)
def test_spellings_of_one_model(name: str, expected: str) -> None:
    assert load_model(name).id == expected


def test_siblings_that_differ_stay_apart() -> None:
    base, chat = load_model("glm-4-9b"), load_model("glm-4-9b-chat")
    assert (base.context_tokens, chat.context_tokens) == (8192, 131072)
    for profile in PROFILES:
        if profile.same_as is not None:
            other = load_model(profile.same_as)
            assert stem(profile.id) == other.id and profile.parameters == other.parameters


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qwen9-7b",
        "../etc",
        "a/b/c",
        "\u202e",
        "someone/qwen2.5-7b",
        "config.json",
        "x" * 5000,
        "-1",
        "qwen",
    ],
)
def test_unknown_names_end_in_a_hint_at_once(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UnknownModel) as caught:
        load_model(name)
    assert time.perf_counter() - start < 0.5
    assert caught.value.hint and len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_hint_names_what_was_meant() -> None:
    with pytest.raises(UnknownModel) as caught:
        load_model("qwen2.5-8b")
    assert caught.value.hint is not None and "qwen2.5-7b" in caught.value.hint
    assert nearest("mixtral", model_ids())[0].startswith("mixtral-8x7b")
    assert len(nearest("a" * 10**6, model_ids())) <= 3


def test_stem_of_a_name_of_variants_only() -> None:
    assert stem("chat") == "chat"
    assert stem("glm-4-9b-chat") == "glm-4-9b"


def test_profile_of_a_config_the_catalogue_does_not_know() -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "rope_theta": 1.0,
    }  # fmt: skip
    profile = profile_from_config(config, "mine", repo_id="me/mine")
    # per layer: q and o 64x64, k and v 64x32, three 64x96, two norms; embedding and head 128x64; last norm
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert profile.parameters == 2 * layer + 2 * 128 * 64 + 64
    assert profile.verification.status == "unverified" and profile.repo_ids == ("me/mine",)
    assert "rope_theta" not in profile.config
    assert {"tie_word_embeddings", "head_dim", "attention_bias"} <= set(profile.defaulted)
