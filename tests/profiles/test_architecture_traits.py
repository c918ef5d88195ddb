"""Trait files: every expression reads, every field has a kind, variants and conditions do what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from profiles.architecture import architecture
from profiles.arithmetic import part_counts
from profiles.catalogue import all_models
from profiles.expressions import compile_expression
from profiles.facts import language_model_types
from profiles.fields import kind_of
from profiles.tensors import linear_names, named_tensors
from profiles.traits import known_model_types, load_traits, merge

PLAIN = {
    "like",
    "path",
    "base",
    "causal_lm",
    "layers_path",
    "field",
    "type",
    "default_type",
    "fields",
    "defaults",
    "as",
    "blocks_path",
}
NORM_KINDS = {"rms", "layer"}


def expressions(part: Any, key: str = "") -> Iterator[str]:
    """Every expression of a trait file, the conditions in its keys included."""
    if isinstance(part, str) and part not in NORM_KINDS:
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from expressions(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in PLAIN and not (name == "as" and isinstance(value, dict)):
                continue
            yield from re.split(r" if | for ", name)[1:]
            yield from expressions(value, name)


@pytest.mark.parametrize("model_type", known_model_types())
def test_every_expression_reads_and_every_field_has_a_kind(model_type: str) -> None:
    traits = load_traits(model_type)
    constants = {"if", "else", "and", "or", "not", "in", "true", "false", "null"}
    own = {"i", "n", *traits.get("let", {}), *traits.get("per_layer", {}), *traits.get("fields", {})}
    scopes = {"outer", "text", "vision", "audio"}
    for text in expressions(traits):
        compile_expression(text)
        bare = re.sub(r"'[^']*'", "", text)
        for name in re.findall(r"(?<![\w.])[A-Za-z_]\w*\b(?!\s*\()", bare):
            if name not in own | scopes | constants:
                kind_of(name)


CATALOGUED = {profile.config["model_type"]: profile.config for profile in all_models()}
# a bare config of these is refused by their class too, or they have none
NO_DEFAULTS = {"dbrx", "dots1", "hunyuan_v1_moe", "kimi_k3_text", "lfm2_moe", "minimax_m3"}


@pytest.mark.parametrize("model_type", sorted({*language_model_types()} - NO_DEFAULTS))
def test_every_language_model_type_has_layers_and_unique_tensors(model_type: str) -> None:
    arch = architecture(CATALOGUED.get(model_type, {"model_type": model_type}))
    names = [name for name, _ in named_tensors(arch)]
    assert len(names) == len(set(names))
    linears = list(linear_names(arch))
    assert linears and len(linears) == len(set(linears))
    counts = part_counts(arch)
    assert counts.layers > 0 and counts.embeddings > 0
    assert arch.layers_path and arch.embeddings[0].shape[0] >= arch.vocab_size - 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 * 3 ** 2", 18),
        ("-7 // 2", -4),
        ("7 % 4 - 1", 2),
        ("10 / 4", 2.5),
        ("a or b", 5),
        ("zero or b", 6),
        ("a and not zero", True),
        ("a if zero else b", 6),
        ("1 if zero else 2 if a else 3", 2),
        ("a in [1, 5]", True),
        ("'x' not in ['x']", False),
        ("items[1]", 20),
        ("config.size", 64),
        ("max(a, b, 2) + min(1, 2)", 7),
        ("len(items) == 2", True),
        ("a != null", True),
        ("a >= 5 and b <= 6", True),
        ("round_up(5, 4)", 8),
        ("is(items, 'list')", True),
        ("int(2.9)", 2),
        ("true", True),
    ],
)
def test_expressions(text: str, value: object) -> None:
    class Scope:
        values: dict[str, Any] = {"a": 5, "b": 6, "zero": 0, "items": [10, 20], "config": {"size": 64}}  # noqa: RUF012

        def lookup(self, name: str) -> Any:
            return self.values[name]

    assert compile_expression(text)(Scope()) == value


@pytest.mark.parametrize("text", ["", "1 +", "(1", "1 2", "a ? b", "a.5", "f(1", "[1", "a not b", "a if b"])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(SyntaxError):
        compile_expression(text)


def test_merging_replaces_removes_and_adds() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": {"x": 1}, "c": 3}
    assert merge(base, {"a": {"y": 5, "z": 6}, "b=": {"q": 1}, "c": None}) == {
        "a": {"x": 1, "y": 5, "z": 6},
        "b": {"q": 1},
    }
    assert base["a"] == {"x": 1, "y": 2}


def test_layers_that_are_equal_share_a_kind() -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 12}
    arch = architecture(config)
    assert len(arch.kinds) == 2 and arch.order == (0, 0, 0, 0, 0, 1) * 2
    assert architecture({**config, "layer_types": ["full_attention"] * 12}).order == (0,) * 12
