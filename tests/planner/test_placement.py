"""Where layers go, in accelerate's terms, and device maps against transformers' own module names."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest

from planner.memory.weights import weight_bytes
from planner.placement import (
    Split,
    balanced,
    offload_map,
    one_device,
    outer_modules,
    resident_layers,
    several_cards,
)
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.schema import Architecture


@lru_cache(maxsize=64)
def known(name: str) -> Architecture:
    return architecture(load_model(name).config)


QWEN = known("qwen2.5-7b")  # 28 layers
WEIGHTS = weight_bytes(QWEN, "none", "none", "bf16")
LAYER = WEIGHTS.layers[0]


class TestResidentLayers:
    @pytest.mark.parametrize(
        ("excess", "resident"),
        [(0, 28), (1, 27), (LAYER, 27), (LAYER + 1, 26), (28 * LAYER, 0)],
    )
    def test_last_layers_leave_first_until_enough_is_saved(self, excess: int, resident: int) -> None:
        split = resident_layers(QWEN, WEIGHTS, excess)
        assert split == Split(resident, (28 - resident) * LAYER)

    def test_then_embeddings_and_head_leave_too(self) -> None:
        split = resident_layers(QWEN, WEIGHTS, 28 * LAYER + 1)
        assert split == Split(0, 28 * LAYER + WEIGHTS.embeddings + WEIGHTS.head, True)

    def test_layers_of_different_kinds_count_with_their_own_size(self) -> None:
        moe = known("deepseek-v2-lite")  # a dense layer, then routed ones
        sizes = weight_bytes(moe, "none", "none", "bf16")
        assert len(set(sizes.layers)) > 1
        split = resident_layers(moe, sizes, sum(sizes.layers[kind] for kind in moe.order[1:]))
        assert split.resident == 1


class TestBalance:
    def test_equal_cards_share_equally_beside_embeddings_and_head(self) -> None:
        counts = balanced(QWEN, WEIGHTS, [24 * 2**30, 24 * 2**30])
        assert sum(counts) == 28 and counts == (14, 14)

    def test_larger_cards_take_more(self) -> None:
        small, large = balanced(QWEN, WEIGHTS, [12 * 2**30, 24 * 2**30])
        assert small + large == 28 and large > 1.5 * small

    def test_every_layer_is_placed_even_where_nothing_has_room(self) -> None:
        assert sum(balanced(QWEN, WEIGHTS, [0, 0, 0])) == 28
        assert sum(balanced(QWEN, WEIGHTS, [2**30] * 5)) == 28


def test_one_device() -> None:
    card, ram = one_device(0, QWEN), one_device("cpu", QWEN)
    assert (card.device_map, card.layers_on_gpu, card.layers_in_ram) == ({"": 0}, 28, 0)
    assert (ram.device_map, ram.layers_on_gpu, ram.layers_in_ram) == ({"": "cpu"}, 0, 28)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading(where: str) -> None:
    placement = offload_map(QWEN, Split(20, 8 * LAYER), where)
    layers = [placement.device_map[f"model.layers.{i}"] for i in range(28)]
    assert layers == [0] * 20 + [where] * 8
    assert placement.device_map["model.embed_tokens"] == placement.device_map["lm_head"] == 0
    counts = (placement.layers_on_gpu, placement.layers_in_ram, placement.layers_on_disk)
    assert counts == ((20, 8, 0) if where == "cpu" else (20, 0, 8))


def test_offloading_everything() -> None:
    placement = offload_map(QWEN, Split(0, 10**12, True), "cpu")
    on_card = {name for name, place in placement.device_map.items() if place == 0}
    assert on_card == {"model.rotary_emb", "model.norm"}, "accelerate computes where something stays"


def test_several_cards() -> None:
    placement = several_cards(QWEN, (10, 10, 8))
    where = placement.device_map
    assert [where[f"model.layers.{i}"] for i in range(28)] == [0] * 10 + [1] * 10 + [2] * 8
    assert (where["model.embed_tokens"], where["model.rotary_emb"]) == (0, 0)
    assert (where["model.norm"], where["lm_head"]) == (2, 2)


def test_modules_outside_the_layers() -> None:
    assert outer_modules(QWEN) == ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    gemma = outer_modules(known("gemma-3-12b-it"))
    assert {"model.vision_tower", "model.multi_modal_projector", "model.language_model.norm"} < set(gemma)


MODELS = (
    "qwen2.5-7b", "gemma-2-2b", "phi-3.5-mini-instruct", "phi-2", "falcon-40b", "mixtral-8x22b-v0.1",
    "gpt-oss-120b", "deepseek-r1", "qwen3-next-80b-a3b-instruct", "nemotron-h-56b-base-8k", "gemma-3-12b-it",
    "qwen2-vl-2b-instruct", "llava-1.5-7b", "gemma-4-e2b-it", "kimi-k2.5",
)  # fmt: skip


@pytest.mark.executor
@pytest.mark.parametrize("name", MODELS)
def test_device_maps_cover_every_tensor_exactly_once(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arch = known(name)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(load_model(name).config)))
    kind = transformers.AutoModelForImageTextToText if arch.towers else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    tensors = [path for path, _ in (*model.named_parameters(), *model.named_buffers())]
    modules = {path for path, _ in model.named_modules()} | set(tensors)
    half = arch.layers // 2
    for placement in (
        offload_map(arch, Split(half, 1), "cpu"),
        several_cards(arch, (half, arch.layers - half)),
    ):
        keys = placement.device_map
        assert [key for key in keys if key not in modules] == []
        covered = {
            path: [key for key in keys if path == key or path.startswith(f"{key}.")] for path in tensors
        }
        assert [path for path, by in covered.items() if len(by) != 1] == []


@pytest.mark.executor
def test_accelerate_accepts_the_map() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**load_model("qwen2.5-7b").config)
        )
    placement = offload_map(QWEN, Split(20, 8 * LAYER), "cpu")
    accelerate.utils.modeling.check_device_map(model, placement.device_map)
