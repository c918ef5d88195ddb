"""Moments of fine-tuning, worked out on the three-layer model. T = 256, D = 64, V = 1000, bf16.

U stands for one hidden state, T x D x 2 B; L for the logits, T x V x 2 B.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from memory_cases import how, known, llama_layer, tiny, train

from planner.memory.head import CHUNK_LOGITS
from planner.memory.layer import layer_cost
from planner.memory.moments import CardMemory, Snapshot
from planner.memory.train import training_memory, training_pass
from planner.types import Strategy, Workload
from profiles.schema import Architecture

U = 256 * 64 * 2
L = 256 * 1000 * 2
LAYER = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 512
"""Seven linears and two norms (128 B, rounded up)."""
WEIGHTS = 2 * 128_000 + 512 + 3 * LAYER
"""Embedding and head of 1000 x 64, final norm, three layers."""
ADAPTERS = 3 * (2 * 1_024 + 9 * 2_048 + 3 * 4_096)
"""float32: per layer two tensors of 256, nine of 512 and three of 1024 elements."""
INPUTS = 4 * 2_048 + 2 * 8_192
"""Token ids, labels, mask and positions (256 x 8 B); cos and sin of 256 x 16 in bf16."""


def memory(arch: Architecture, work: Workload, strategy: Strategy, workspace: int = 0) -> CardMemory:
    return training_memory(arch, work, strategy, workspace)


def lines(shot: Snapshot) -> dict[str, int]:
    return {line.name: line.bytes for line in shot.lines}


def at(card: CardMemory, moment: str) -> Iterable[Snapshot]:
    return [shot for shot in card.snapshots if shot.moment == moment]


def test_what_lasts() -> None:
    card = memory(tiny(), train(), how(), workspace=1000)
    first = lines(card.snapshots[0])
    assert first["weights"] == card.load_bytes == WEIGHTS
    assert first["adapters"] == ADAPTERS
    assert first["library workspace"] == 2 * 1000  # of the main and of the autograd thread
    assert first["inputs and rope"] == INPUTS


@pytest.mark.parametrize(
    ("optimizer", "state", "temporary"),
    [
        ("sgd", 0, 0),
        ("adamw_torch", 2 * ADAPTERS, ADAPTERS),
        ("adamw_torch_fused", 2 * ADAPTERS + 3 * 14 * 512, 0),
        ("lion_32bit", ADAPTERS, 0),
    ],
)
def test_optimizer_step(optimizer: str, state: int, temporary: int) -> None:
    card = memory(tiny(), train(), how(optimizer=optimizer))
    (step,) = at(card, "optimizer_step")
    found = lines(step)
    assert found.get("optimizer state", 0) == state
    assert found.get("optimizer temporaries", 0) == temporary
    assert found["gradients"] == ADAPTERS
    assert step.bytes == WEIGHTS + ADAPTERS + INPUTS + state + temporary + ADAPTERS


def test_checkpoints_are_one_input_a_layer() -> None:
    card = memory(tiny(), train(), how())
    forward, loss = card.snapshots[0], card.snapshots[1]
    assert lines(forward)["checkpoints"] == lines(loss)["checkpoints"] == 3 * U
    # backward gives them back one by one
    held = [lines(shot).get("checkpoints", 0) for shot in at(card, "backward")]
    assert held == [3 * U, 2 * U, U, 0]


def test_offloaded_checkpoints_leave_two_on_the_card() -> None:
    card = memory(tiny(), train(), how(activation_offload=True))
    assert lines(card.snapshots[0])["checkpoints"] == 2 * U
    assert card.host_bytes == U  # those of the last two layers never leave
    held = [lines(shot).get("checkpoints", 0) for shot in at(card, "backward")]
    assert held == [2 * U, 2 * U, U, 0]


def test_backward_of_a_layer_under_checkpointing() -> None:
    card = memory(tiny(), train(), how())
    cost = layer_cost(llama_layer(), training_pass(tiny(), train(), how()), 64)
    last, middle, *_ = at(card, "backward")
    assert lines(last)["layer in work"] == cost.recompute_peak
    # the last layer's adapters have gradients by the time the middle one runs
    assert (lines(last).get("gradients", 0), lines(middle)["gradients"]) == (0, ADAPTERS // 3)


def test_without_checkpointing_every_layer_keeps_what_it_saved() -> None:
    card = memory(tiny(), train(), how(gradient_checkpointing=False))
    cost = layer_cost(llama_layer(), training_pass(tiny(), train(), how()), 64)
    first = layer_cost(llama_layer(), training_pass(tiny(), train(), how()), 64, True)
    # nothing asks the embeddings for a gradient: the first layer saves less
    total = 2 * cost.saved + first.saved
    assert lines(card.snapshots[1])["activations"] == total
    held = [lines(shot).get("activations", 0) for shot in at(card, "backward")][:3]
    assert held == [first.saved + cost.saved, first.saved, 0]


def test_loss_holds_three_float32_copies_of_the_logits() -> None:
    card = memory(tiny(), train(), how())
    _, backward = at(card, "loss")
    norm = 2 * U + 1024
    assert lines(backward)["logits and loss"] == norm + 512 + 3 * 2 * L
    assert backward.largest_block == 2 * L


def test_peak_moment_follows_the_vocabulary() -> None:
    wide, narrow = (memory(tiny(vocab_size=v), train(), how()) for v in (8000, 16))
    assert wide.peak.moment == "loss" and narrow.peak.moment == "backward"
    assert memory(
        tiny(vocab_size=16), train(lora_rank=512, seq_len=8), how(optimizer="adamw_torch")
    ).peak.moment == ("optimizer_step")


def test_fused_loss_takes_the_logits_away() -> None:
    full, fused = (memory(tiny(vocab_size=80_000), train(), how(loss=loss)) for loss in ("full", "fused"))
    assert fused.peak.bytes < full.peak.bytes - 2 * 2 * 80 * L
    assert all(shot.largest_block == 4 * CHUNK_LOGITS for shot in at(fused, "loss"))


def test_liger_brings_its_fused_loss_along() -> None:
    assert memory(tiny(), train(), how(kernels="liger")) == memory(
        tiny(), train(), how(kernels="liger", loss="fused")
    )


def test_accumulation_keeps_gradients_through_forward_and_loss() -> None:
    once = memory(tiny(), train(), how())
    twice = memory(tiny(), train(gradient_accumulation_steps=2), how())
    assert "gradients" not in lines(once.snapshots[0])
    assert [lines(shot)["gradients"] for shot in twice.snapshots[:2]] == [ADAPTERS, ADAPTERS]
    assert all(lines(shot)["gradients"] == ADAPTERS for shot in at(twice, "backward"))
    # a third micro-batch changes nothing
    assert memory(tiny(), train(gradient_accumulation_steps=3), how()) == twice


EMBEDDING = 1000 * 64 * 2


@pytest.mark.parametrize(
    ("tied", "steps", "extra"), [(False, 1, 0), (True, 1, 2), (True, 4, 3), (False, 4, 0)]
)
def test_a_tied_embeddings_gradient_meets_the_heads(tied: bool, steps: int, extra: int) -> None:
    arch = tiny(tie_word_embeddings=tied)
    card = memory(arch, train("full", gradient_accumulation_steps=steps), how())
    last = list(at(card, "backward"))[-1]
    everything = card.load_bytes  # a gradient for every parameter, in its own dtype
    assert lines(last)["gradients"] == everything
    assert lines(last)["layer in work"] == U + extra * EMBEDDING
    assert last.largest_block == EMBEDDING


def test_full_fine_tuning_with_adamw_is_four_times_the_weights() -> None:
    card = memory(tiny(), train("full"), how(optimizer="adamw_torch"))
    (step,) = at(card, "optimizer_step")
    found = lines(step)
    assert found["optimizer state"] == 2 * WEIGHTS
    assert found["optimizer temporaries"] == found["gradients"] == WEIGHTS
    assert "adapters" not in found


def test_paged_states_are_managed_memory() -> None:
    work = train("qlora", seq_len=2048)
    paged, resident = (
        memory(known("qwen2.5-7b"), work, how(quant="nf4", optimizer=name))
        for name in ("paged_adamw_8bit", "adamw_8bit")
    )
    # q, o: A and B of 28,672; k, v: 28,672 and 4,096; gate, up, down: 28,672 and 151,552. Only the last,
    # one in each of 3 x 28 linears, has 100,000 elements: two states of a byte each
    assert paged.managed_bytes == 2 * 3 * 28 * 151_552
    assert resident.managed_bytes == 0
    assert resident.peak.bytes - paged.peak.bytes == paged.managed_bytes


def test_kbit_preparation_doubles_what_is_not_quantized() -> None:
    arch = known("qwen2.5-7b")
    card = memory(arch, train("qlora"), how(quant="nf4", upcast_frozen=True))
    embeddings = 2 * 152_064 * 3_584 * 2
    biases = 28 * (7_168 + 1_024 + 1_024)
    norms = 57 * 7_168
    assert lines(card.snapshots[0])["upcast weights"] == embeddings + biases + norms
    plain = memory(arch, train("qlora"), how(quant="nf4"))
    # the residual stream is float32 too: checkpoints of 28 x 256 x 3584 x 4 B
    assert lines(card.snapshots[0])["checkpoints"] == 2 * lines(plain.snapshots[0])["checkpoints"]
    assert lines(card.snapshots[0])["checkpoints"] == 28 * 256 * 3_584 * 4


def test_int8_matmuls_keep_their_inputs_through_checkpointing() -> None:
    card = memory(tiny(), train("qlora"), how(quant="int8"))
    kept = [lines(shot).get("kept by int8 matmuls", 0) for shot in at(card, "backward")]
    assert lines(card.snapshots[0])["kept by int8 matmuls"] == kept[0] == 3 * kept[2] > 0
    assert kept[-1] == 0


def test_loading_nf4_peaks_above_what_is_loaded() -> None:
    card = memory(known("qwen2.5-7b"), train("qlora"), how(quant="nf4"))
    n = 3_584 * 18_944 * 2
    assert card.load_peak_bytes - card.load_bytes == n + n // 16
    assert card.dequantized_bytes == n


def test_eager_attention_brings_a_mask() -> None:
    sdpa, eager = (memory(tiny(), train(), how(attention=name)) for name in ("sdpa", "eager"))
    mask = 256 * 256 * 2
    assert lines(eager.snapshots[0])["inputs and rope"] - lines(sdpa.snapshots[0])["inputs and rope"] == mask


def test_moments_come_in_the_order_of_a_step() -> None:
    card = memory(tiny(), train(), how())
    assert list(card.by_moment) == ["forward", "loss", "backward", "optimizer_step"]
    assert max(card.by_moment.values()) == card.peak.bytes


def test_float32_training_needs_no_autocast() -> None:
    p = training_pass(tiny(), train(), how(dtype="fp32"))
    assert (p.width, p.stream, p.autocast) == (4, 4, False)
    assert memory(tiny(), train(), how(dtype="fp32")).load_bytes > 1.9 * WEIGHTS
