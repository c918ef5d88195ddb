"""Hand-made models and a small estimator whose every byte a test can work out."""

from __future__ import annotations

from msgspec.structs import replace

from planner.machine import budget, machine_from_gpus
from planner.memory.weights import weight_bytes
from planner.speed import predict_speed
from planner.types import (
    DiskEstimate,
    Estimate,
    GpuEstimate,
    Host,
    HostEstimate,
    Machine,
    ModelRef,
    PlacementMap,
    Stack,
    Strategy,
    Workload,
)
from planner.units import GIB
from planner.work import count_work, layer_bytes
from profiles.architecture import architecture
from profiles.hardware import load_gpu
from profiles.schema import ModelProfile, Verification

STACK = Stack("2.11", "5.17", "0.50", "0.21")

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip
QWEN_14B = {
    **QWEN_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
    "num_attention_heads": 40, "num_key_value_heads": 8,
}  # fmt: skip
GEMMA_2_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    "max_position_embeddings": 8192, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "torch_dtype": "bfloat16", "query_pre_attn_scalar": 256,
}  # fmt: skip


def profile(config: dict, name: str = "a-model") -> ModelProfile:
    """A profile of a config, as the catalogue would hold it."""
    arch = architecture(config)
    return ModelProfile(
        id=name,
        name=name,
        family=arch.model_type,
        repo_ids=(),
        config=config,
        parameters=count_work(arch).weights,
        verification=Verification("unverified"),
        sources=(),
        context_tokens=arch.max_position_embeddings,
    )


def card(name: str, count: int = 1, ram_gib: int | None = None, cores: int | None = None) -> Machine:
    """A machine with catalogue cards, and RAM when named."""
    machine = machine_from_gpus([(load_gpu(name), count)])
    ram = None if ram_gib is None else ram_gib * GIB
    return replace(machine, host=Host(ram_total_bytes=ram, ram_available_bytes=ram, cores=cores))


def no_card(ram_gib: int = 32, cores: int = 8) -> Machine:
    """A machine with a CPU only."""
    return Machine(host=Host(ram_total_bytes=ram_gib * GIB, ram_available_bytes=ram_gib * GIB, cores=cores))


def needed_bytes(model: ModelProfile, workload: Workload, strategy: Strategy) -> int:
    """Weights, plus 1 MiB a token (a quarter with a fused loss), plus 12 bytes an element trained in full."""
    arch = architecture(model.config)
    tokens = workload.sequences * (
        workload.seq_len if workload.task == "train" else workload.prompt_tokens + workload.new_tokens
    )
    per_token = 2**18 if strategy.loss == "fused" else 2**20
    state = 0
    if workload.task == "train" and workload.method == "full":
        state = count_work(arch).weights * (12 if strategy.optimizer == "adamw_torch_fused" else 4)
    weights = weight_bytes(arch, strategy.quant, strategy.quant_experts, strategy.dtype)
    return weights.total(arch.order) + tokens * per_token + state


def estimate(
    model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy, stack: Stack | None = None
) -> Estimate:
    """`needed_bytes` with 5 % either way; what an offload placement leaves off the card goes to RAM."""
    arch = architecture(model.config)
    needed = needed_bytes(model, workload, strategy)
    placement, ram = PlacementMap(layers_on_gpu=arch.layers), 2 * GIB
    gpus: tuple[GpuEstimate, ...] = ()
    if strategy.placement == "cpu":
        ram = needed
        free = machine.host.ram_available_bytes
        # Of a machine looked at for its cards, RAM that nobody named is taken to be enough.
        verdict = "fits" if free is None or ram <= free else "does_not_fit"
    else:
        cards = len(machine.gpus) if workload.task == "infer" else 1
        limit, basis = budget(machine.gpus[0])
        share = needed // cards
        if strategy.placement != "full_gpu":
            moved = min(share, max(0, share - limit * 8 // 10))
            layers = min(arch.layers, -(-moved * arch.layers // int(layer_bytes(count_work(arch), strategy))))
            placement = PlacementMap(layers_on_gpu=arch.layers - layers, layers_in_ram=layers)
            share, ram = share - moved, ram + moved
        low, high = share * 95 // 100, share * 105 // 100
        verdict = "fits" if high <= limit else "tight" if low <= limit else "does_not_fit"
        free = machine.host.ram_available_bytes
        if strategy.placement != "full_gpu" and (free is None or ram > free):
            verdict = "unknown" if free is None else "does_not_fit"
        gpus = tuple(
            GpuEstimate(
                index=index, budget_bytes=limit, budget_basis=basis, load_bytes=share,
                allocated_peak_bytes=share, required_bytes=share, context_bytes=0, process_bytes=share,
                low_bytes=low, high_bytes=high, managed_bytes=0, peak_moment="forward", components=(),
            )
            for index in range(cards)
        )  # fmt: skip
    return Estimate(
        model=ModelRef(model.id, model.parameters),
        stack=stack or STACK,
        gpus=gpus,
        host=HostEstimate(ram_bytes=ram),
        disk=DiskEstimate(),
        speed=predict_speed(arch, machine, workload, strategy, placement),
        verdict=verdict,
        placement=placement,
    )
