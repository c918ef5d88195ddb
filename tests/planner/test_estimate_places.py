"""Jobs that live in several places: RAM, disk, several cards, no card."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.estimate import architecture_of, estimate
from planner.machine import machine_from_gpus
from planner.memory.overheads import process_ram
from planner.memory.weights import weight_bytes
from planner.types import Estimate, Machine, Strategy, Workload
from planner.units import GIB
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

QWEN = load_model("qwen2.5-7b")
ARCH = architecture_of(QWEN)
WEIGHTS = weight_bytes(ARCH, "none", "none", "bf16")
LAYER, OUTER = WEIGHTS.layers[0], WEIGHTS.embeddings + WEIGHTS.head
MATRIX = 3_584 * 18_944 * 2
INFER = Workload(task="infer")


def card(gib: float, count: int = 1, **sizes: int) -> Machine:
    return machine_from_gpus(
        [(load_gpu("rtx-3090"), count)], vram_bytes=int(gib * GIB), reserve_bytes=0, **sizes
    )


def offloaded(gib: float, where: str = "mixed_offload", **sizes: int) -> Estimate:
    return estimate(QWEN, card(gib, **sizes), INFER, Strategy(placement=where))


def lines(found: Estimate) -> dict[str, int]:
    return {line.name: line.bytes for line in found.gpus[0].components}


class TestOffload:
    def test_what_fits_stays(self) -> None:
        found = offloaded(24)
        assert found.placement.layers_on_gpu == 28 and found.verdict == "fits"
        assert found.gpus == estimate(QWEN, card(24), INFER, Strategy()).gpus

    @pytest.mark.parametrize("gib", [4, 6, 8, 10, 12, 14])
    def test_layers_leave_until_the_rest_fits(self, gib: int) -> None:
        found = offloaded(gib)
        gpu, whole = found.gpus[0], estimate(QWEN, card(gib), INFER, Strategy()).gpus[0]
        gone = 28 - found.placement.layers_on_gpu
        assert gpu.high_bytes <= gpu.budget_bytes and found.verdict == "fits"
        assert gpu.load_bytes == whole.load_bytes - gone * LAYER
        assert lines(found)["weights"] == gpu.load_bytes
        assert lines(found)["offload buffer"] == MATRIX
        assert gpu.allocated_peak_bytes == whole.allocated_peak_bytes - gone * LAYER + MATRIX
        # one layer more on the card would not surely fit any more (with a part outside, more is left open)
        assert 1.02 * (whole.high_bytes + MATRIX - (gone - 1) * LAYER) > gpu.budget_bytes

    def test_smaller_cards_keep_fewer_layers(self) -> None:
        kept = [offloaded(gib).placement.layers_on_gpu for gib in (4, 6, 8, 10, 12, 14, 20)]
        assert kept == sorted(kept) and kept[0] < kept[-1] == 28

    def test_embeddings_leave_last(self) -> None:
        found = offloaded(2)
        assert found.placement.layers_on_gpu == 0
        assert found.placement.device_map["model.embed_tokens"] == "cpu"
        # then a whole vocabulary matrix passes through instead of one linear
        assert lines(found)["offload buffer"] == WEIGHTS.head

    def test_ram_holds_what_left_the_card(self) -> None:
        found = offloaded(10)
        ram = {line.name: line.bytes for line in found.host.components}
        assert ram["offloaded weights"] == found.placement.layers_in_ram * LAYER
        assert found.disk.components == estimate(QWEN, card(24), INFER, Strategy()).disk.components

    def test_on_disk_they_are_read_where_the_checkpoint_is(self) -> None:
        found = offloaded(10, "disk_offload")
        assert found.placement.layers_on_disk > 0
        assert found.disk.components == estimate(QWEN, card(24), INFER, Strategy()).disk.components
        assert all(line.name != "offloaded weights" for line in found.host.components)
        assert set(found.placement.device_map.values()) == {0, "disk"}

    def test_experts_that_are_put_together_are_written_to_a_folder(self) -> None:
        model = load_model("qwen3-30b-a3b")
        found = estimate(model, card(24), INFER, Strategy(placement="disk_offload"))
        folder = {line.name: line.bytes for line in found.disk.components}["offload folder"]
        # 128 experts of three matrices, 2048 x 768, in each layer that left the card
        assert folder == found.placement.layers_on_disk * 128 * 3 * 2048 * 768 * 2 > 0

    def test_ram_that_is_short_decides(self) -> None:
        assert offloaded(6, ram_bytes=8 * GIB).verdict == "does_not_fit"
        assert offloaded(6, ram_bytes=64 * GIB).verdict == "fits"

    def test_a_disk_that_is_short_decides(self) -> None:
        assert offloaded(6, "disk_offload", disk_bytes=8 * GIB).verdict == "does_not_fit"
        assert offloaded(6, "disk_offload", disk_bytes=64 * GIB).verdict == "fits"
        assert offloaded(6, "mixed_offload", disk_bytes=8 * GIB).verdict == "fits"

    def test_a_card_too_small_for_the_run_itself(self) -> None:
        assert offloaded(1).verdict == "does_not_fit"


class TestSeveralCards:
    def test_weights_are_shared_out(self) -> None:
        one = estimate(QWEN, card(24), INFER, Strategy()).gpus[0]
        found = estimate(QWEN, card(24, 2), INFER, Strategy())
        first, last = found.gpus
        assert (first.index, last.index) == (0, 1)
        assert first.load_bytes + last.load_bytes == one.load_bytes
        assert first.load_bytes == 14 * LAYER + WEIGHTS.embeddings
        assert last.load_bytes == 14 * LAYER + WEIGHTS.head + 7_168
        assert found.placement.device_map["model.layers.13"] == 0
        assert found.placement.device_map["model.layers.14"] == 1

    def test_a_tied_head_is_a_copy_on_the_last_card(self) -> None:
        tied = load_model("qwen2.5-0.5b")
        embedding = weight_bytes(architecture_of(tied), "none", "none", "bf16").embeddings
        one = estimate(tied, card(24), INFER, Strategy()).gpus[0].load_bytes
        both = estimate(tied, card(24, 2), INFER, Strategy()).gpus
        assert sum(gpu.load_bytes for gpu in both) == one + embedding

    def test_every_card_must_fit(self) -> None:
        assert estimate(QWEN, card(14), INFER, Strategy()).verdict == "does_not_fit"
        assert estimate(QWEN, card(14, 2), INFER, Strategy()).verdict == "fits"
        assert estimate(QWEN, card(4, 2), INFER, Strategy()).verdict == "does_not_fit"

    def test_training_is_a_replica_on_each(self) -> None:
        work = Workload(task="train")
        how = Strategy(quant="nf4", optimizer="paged_adamw_8bit")
        one, two = (estimate(QWEN, card(24, n), work, how) for n in (1, 2))
        assert len(two.gpus) == 2
        assert all(replace(gpu, index=0) == one.gpus[0] for gpu in two.gpus)
        assert any("replica" in text for text in two.reasons)

    @pytest.mark.parametrize("name", ["gemma-3-12b-it", "deepseek-v2-lite", "qwen3-next-80b-a3b-instruct"])
    @pytest.mark.parametrize("count", [2, 3, 8])
    def test_nothing_is_lost_between_cards(self, name: str, count: int) -> None:
        model = load_model(name)
        arch = architecture_of(model)
        one = estimate(model, card(200), INFER, Strategy()).gpus[0].load_bytes
        parts = estimate(model, card(200, count), INFER, Strategy()).gpus
        again = weight_bytes(arch, "none", "none", "bf16").embeddings if arch.head is None else 0
        assert sum(gpu.load_bytes for gpu in parts) in (one, one + again)


class TestCpu:
    def test_no_card_no_gpus(self) -> None:
        machine = Machine(host=card(24, ram_bytes=64 * GIB).host)
        for found in (
            estimate(QWEN, machine, INFER, Strategy()),
            estimate(QWEN, card(24, ram_bytes=64 * GIB), INFER, Strategy(placement="cpu")),
        ):
            assert found.gpus == () and found.verdict == "fits"
            assert found.placement.device_map == {"": "cpu"}

    def test_ram_is_the_process_the_run_and_a_tensor_in_flight(self) -> None:
        machine = card(24, ram_bytes=64 * GIB)
        found = estimate(QWEN, machine, INFER, Strategy(placement="cpu"))
        ram = {line.name: line.bytes for line in found.host.components}
        run = estimate(QWEN, card(24), INFER, Strategy()).gpus[0].allocated_peak_bytes
        workspace = int(8.125 * 2**20)
        assert ram["process"] == process_ram(False)
        assert ram["run"] == run - workspace  # cuBLAS has none there
        assert ram["loading or saving"] == WEIGHTS.embeddings

    def test_verdict_is_about_ram(self) -> None:
        for gib, verdict in ((64, "fits"), (8, "does_not_fit")):
            machine = card(24, ram_bytes=gib * GIB)
            assert estimate(QWEN, machine, INFER, Strategy(placement="cpu")).verdict == verdict
        assert estimate(QWEN, Machine(), INFER, Strategy()).verdict == "unknown"


def test_full_fine_tuning_saves_through_ram_and_disk() -> None:
    work = Workload(task="train", method="full")
    found = estimate(QWEN, card(200), work, Strategy(optimizer="adamw_torch_fused"))
    ram = {line.name: line.bytes for line in found.host.components}
    assert ram["loading or saving"] == WEIGHTS.total(ARCH.order)
    disk = {line.name: line.bytes for line in found.disk.components}
    assert disk["download"] == disk["final model"] == 2 * 7_615_616_512
    # weights and two states of two bytes, twice, and what rounding adds
    assert disk["checkpoints"] == pytest.approx(2 * 6 * 7_615_616_512, rel=0.003)


def test_a_lora_leaves_its_adapter() -> None:
    found = estimate(QWEN, card(200), Workload(task="train", method="lora"), Strategy(optimizer="sgd"))
    disk = {line.name: line.bytes for line in found.disk.components}
    assert disk["final adapter"] == 4 * 20_185_088
    assert disk["checkpoints"] == 2 * 4 * 20_185_088
