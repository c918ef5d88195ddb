"""Jobs, strategies, models and machines in a few words."""

from __future__ import annotations

from planner.memory.weights import fused_experts
from planner.render.text import UNKNOWN, gib, parameters, rate, tokens
from planner.types import Gpu, Machine, MeasuredHere, PlacementMap, Speed, Strategy, Workload
from profiles.schema import Architecture, Attention, GpuProfile, ModelProfile

QUANTS = {"none": "", "nf4": "NF4", "int8": "int8"}
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}
PLACEMENTS = {
    "full_gpu": "all on the card",
    "mixed_offload": "card + RAM",
    "disk_offload": "card + RAM + disk",
    "cpu": "CPU and RAM only",
}
ATTENTIONS = {
    "full": "attention",
    "sliding": "sliding-window attention",
    "chunked": "chunked attention",
    "latent": "latent attention",
    "recurrent": "linear attention",
    "cross": "cross-attention",
    "none": "no attention",
}


def job(work: Workload) -> str:
    """What is done: `generate 256 tokens after 1024, batch 1`."""
    if work.task == "infer":
        users = f" x {work.concurrency}" if work.concurrency > 1 else ""
        return f"generate {work.new_tokens} tokens after {work.prompt_tokens}, batch {work.batch_size}{users}"
    adapters = f" (r={work.lora_rank}, {work.lora_targets})" if work.method != "full" else ""
    return f"{METHODS[work.method]}{adapters} on {work.batch_size} x {work.seq_len} tokens"


def weights(strategy: Strategy) -> str:
    """How the weights are stored: `bf16`, `NF4`."""
    return QUANTS[strategy.quant] or strategy.dtype


def strategy(how: Strategy, work: Workload, arch: Architecture | None = None) -> str:
    """How it is done, in one line. `arch`: of the model, to say what its experts are stored as."""
    parts = [f"{weights(how)} weights"]
    if how.quant != "none" and arch is not None and fused_experts(arch):
        parts.append(f"experts {QUANTS[how.quant_experts] or how.dtype}")
    if how.quant != "none":
        parts.append(f"{how.dtype} compute")
    parts.append(PLACEMENTS[how.placement])
    if how.engine != "resident":
        parts.append(f"engine {how.engine}")
    if work.task == "train":
        parts.append("checkpointing" if how.gradient_checkpointing else "no checkpointing")
        parts.append(how.optimizer)
        parts.append(f"{how.loss} loss")
        if how.activation_offload:
            parts.append("activations offloaded")
    else:
        parts.append(f"{how.cache} cache")
    parts.append(how.attention)
    if how.kernels != "torch":
        parts.append(f"{how.kernels} kernels")
    return ", ".join(parts)


def placement(how: Strategy, where: PlacementMap) -> str:
    """Where layers are: also on disk, where RAM did not hold what streams."""
    return PLACEMENTS["disk_offload" if where.layers_on_disk else how.placement]


def card(profile: GpuProfile, count: int = 1) -> str:
    """`NVIDIA GeForce RTX 3090, 24.0 GiB, 350 W`."""
    facts = [profile.name, f"{gib(profile.memory_bytes)} GiB"]
    if profile.power_watts:
        facts.append(f"{profile.power_watts} W")
    return (f"{count} x " if count > 1 else "") + ", ".join(facts)


def launch(profile: GpuProfile) -> str:
    """Launch price with its date: `1500 USD (2020-09)`; a dash when not known."""
    if profile.launch_price_usd is None:
        return UNKNOWN
    return f"{profile.launch_price_usd} USD" + (
        f" ({profile.launch_date[:7]})" if profile.launch_date else ""
    )


def machine(target: Machine) -> str:
    """Cards, RAM and disk of a machine in one line."""
    cards = _gpus(target.gpus) if target.gpus else "no GPU"
    return f"{cards}, {host(target)}".removesuffix(", ")


def host(target: Machine) -> str:
    """RAM and disk of a machine, as far as they are known."""
    parts = []
    host = target.host
    if host.ram_total_bytes is not None:
        free = f" ({gib(host.ram_available_bytes)} free)" if host.ram_available_bytes is not None else ""
        parts.append(f"{gib(host.ram_total_bytes)} GiB RAM{free}")
    if target.disks:
        parts.append(f"{gib(max(disk.free_bytes for disk in target.disks))} GiB free disk")
    return ", ".join(parts)


def probed(speed: Speed) -> bool:
    """Whether a speed rests on rates measured on the machine itself."""
    return (speed.basis or "").startswith("probe of ")


def measured(here: MeasuredHere) -> str:
    """What earlier runs measured: `allocated peak 9.2 GiB, training 830 tok/s (2 rehearsals, last ...)`."""
    sizes = (
        ("after loading", here.load_bytes),
        ("allocated peak", here.allocated_peak_bytes),
        ("process", here.process_bytes),
        ("RAM", here.ram_bytes),
    )
    speeds = (
        ("prefill", here.prefill_tokens_per_s),
        ("decode", here.decode_tokens_per_s),
        ("training", here.train_tokens_per_s),
    )
    parts = [f"{name} {gib(n, digits=2)} GiB" for name, n in sizes if n is not None]
    parts += [f"{name} {rate(n)} tok/s" for name, n in speeds if n is not None]
    runs = f"{here.runs} {here.kind}{'s' if here.runs > 1 else ''}"
    return f"{', '.join(parts)} ({runs}, last {here.last})"


def _gpus(gpus: tuple[Gpu, ...]) -> str:
    first = gpus[0]
    free = f", {gib(first.free_bytes)} free" if first.free_bytes is not None else ""
    many = f"{len(gpus)} x " if len(gpus) > 1 else ""
    return f"{many}{first.profile.name} ({gib(first.total_bytes)} GiB{free})"


def architecture(arch: Architecture) -> str:
    """Layers, width, kinds of attention, feed-forward and vocabulary in one line."""
    kinds: dict[str, int] = {}
    for index in arch.order:
        name = _attention(arch.kinds[index].attention)
        kinds[name] = kinds.get(name, 0) + 1
    mixers = ", ".join(name if len(kinds) == 1 else f"{n} x {name}" for name, n in kinds.items())
    experts = [kind.feed_forward.experts for kind in arch.kinds if kind.feed_forward.experts]
    moe = f", {experts[0].count} experts ({experts[0].per_token} used)" if experts else ""
    return f"{arch.layers} layers x {arch.hidden_size}, {mixers}{moe}, vocabulary {arch.vocab_size}"


def _attention(a: Attention) -> str:
    if a.kind == "full":
        grouped = "MHA" if a.kv_heads == a.heads else "MQA" if a.kv_heads == 1 else "GQA"
        return f"{grouped} {a.heads}/{a.kv_heads}"
    window = f" of {tokens(a.window)}" if a.window else ""
    return ATTENTIONS[a.kind] + window


def model(profile: ModelProfile) -> str:
    """Name, parameters and context in one line."""
    active = f" ({parameters(profile.active_parameters)} active)" if profile.active_parameters else ""
    context = f", context {profile.context_tokens} tokens" if profile.context_tokens else ""
    return f"{profile.name}: {parameters(profile.parameters)} parameters{active}{context}"
