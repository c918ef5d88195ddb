"""What excludes what, as a table: each rule names the settings it looks at, why they do not go together, and
what would make them.

A rule is about the plain Hugging Face stack (transformers, peft, accelerate, bitsandbytes) as the executor
uses it. Adding one is adding a row; `planner.strategies` walks the table and nothing else decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec
from msgspec import Struct

from planner.case import Case as Case
from planner.memory.shapes import numerics
from planner.memory.weights import fused_experts
from planner.rates import has_bf16
from planner.types import Machine, Strategy, Workload
from profiles.data import read_table
from profiles.precisions import STORED, load_precisions
from profiles.schema import Architecture

_FLASH_ATTENTION_LARGEST_HEAD = 256


class Rule(Struct, frozen=True):
    """One row: `excludes` is true for a strategy that is not possible."""

    name: str
    excludes: Callable[[Case], bool]
    reason: str
    needs: str
    about: tuple[str, ...] = ("placement", "quant")
    """Settings that make one exclusion differ from another in a list of them."""


def trains_on(quant: str, method: str) -> bool:
    """Whether a method can train over weights of that precision: QLoRA is LoRA over any quantized base."""
    if quant == "none":
        return method in ("full", "lora")
    methods = load_precisions()[quant].trains
    return method in methods or (method == "qlora" and "lora" in methods)


def _lacks_bf16(case: Case) -> bool:
    return case.strategy.dtype == "bf16" and not all(map(has_bf16, case.cards))


def _too_old_for(quant: str) -> Callable[[Case], bool]:
    def excludes(case: Case) -> bool:
        return case.strategy.quant == quant and case.weaker_than(
            load_precisions()[quant].least_compute_capability
        )

    return excludes


def _too_old_for_fp16(case: Case) -> bool:
    return case.strategy.dtype == "fp16" and case.weaker_than(
        load_precisions()["fp16"].least_compute_capability
    )


def _rmsprop_without_kernel(c: Case) -> bool:
    """bitsandbytes/backends/cuda/ops.py, `str2optimizer32bit`: rmsprop comes for fp32 and fp16 alone."""
    full = c.workload.method == "full"
    bf16 = (c.strategy.dtype if full else c.workload.adapter_dtype) == "bf16"
    optimizer = c.strategy.optimizer
    return bf16 and optimizer.startswith("rmsprop_bnb") and (full or not optimizer.endswith("_8bit"))


def _flash_attention(case: Case) -> bool:
    return case.strategy.attention == "flash_attention_2"


def has_sinks(arch: Architecture) -> bool:
    """Whether attention has learned sinks, which take part in its softmax (gpt-oss)."""
    return any("sink" in tensor.name for layer in arch.kinds for tensor in layer.attention.parameters)


def lacks_sdpa(arch: Architecture) -> bool:
    """Whether transformers offers no sdpa: it knows neither a cap on attention logits nor sinks."""
    return has_sinks(arch) or any(layer.attention.softcap for layer in arch.kinds)


def _wide_heads(case: Case) -> bool:
    return any(layer.attention.head_dim > _FLASH_ATTENTION_LARGEST_HEAD for layer in case.arch.kinds)


def keeps_state(arch: Architecture) -> bool:
    """Whether layers keep a sum of all tokens so far, from which none can be taken away again."""
    states = [layer.attention.state for layer in arch.kinds if layer.attention.kind == "recurrent"]
    return any(state is None or state.state_elements for state in states)


@cache
def liger_model_types() -> frozenset[str]:
    """Model types that liger-kernel patches; it leaves the others as they are."""
    facts = msgspec.json.decode(read_table("kernels.json"))
    return frozenset(facts["liger"]["model_types"])


def _liger(case: Case) -> bool:
    return case.strategy.kernels == "liger"


def _not_nvidia(case: Case) -> bool:
    return any(gpu.profile.vendor != "nvidia" for gpu in case.cards)


def _by_bitsandbytes(case: Case) -> bool:
    return (case.arch.pretrained_quantization or "").startswith("bitsandbytes-")


RULES: tuple[Rule, ...] = (
    Rule(
        "no_card",
        lambda c: c.strategy.placement != "cpu" and not c.machine.gpus,
        "there is no card in this machine",
        "--placement cpu, or a card named with --gpu",
        (),
    ),
    Rule(
        "stream_placement",
        lambda c: c.strategy.engine == "stream" and not c.offloads,
        "engine stream brings layers to a card from RAM or disk: placement mixed_offload or disk_offload",
        "--placement mixed_offload or disk_offload, or another engine",
        ("placement",),
    ),
    Rule(
        "stream_full",
        lambda c: c.strategy.engine == "stream" and c.train and c.workload.method == "full",
        "engine stream brings weights to the card and never back, and full fine-tuning changes them",
        "--method qlora or lora, or --placement full_gpu on a larger card",
        ("placement",),
    ),
    Rule(
        "stream_upcast",
        lambda c: c.strategy.engine == "stream" and c.train and c.strategy.upcast_frozen,
        "engine stream keeps frozen weights as they are",
        "no --upcast-frozen",
        ("placement",),
    ),
    Rule(
        "resident_offload",
        lambda c: c.strategy.engine == "resident" and c.offloads,
        "engine resident keeps every layer where it computes and offloads none",
        "--engine stream or accelerate, or --placement full_gpu",
    ),
    Rule(
        "accelerate_without_card",
        lambda c: c.strategy.engine == "accelerate" and c.strategy.placement == "cpu",
        "engine accelerate moves layers to a card, and placement cpu uses none",
        "--engine resident",
    ),
    Rule(
        "train_offloaded",
        lambda c: c.train and c.offloads and c.strategy.engine == "accelerate",
        "training does not run under accelerate's offload: backward needs weights its hooks have taken away",
        "--engine stream, --placement full_gpu on a larger card, or --placement cpu",
        ("placement",),
    ),
    Rule(
        "offload_quantized",
        lambda c: c.offloads and c.strategy.quant != "none" and c.strategy.engine == "accelerate",
        "under accelerate, offloaded modules stay unquantized, and transformers refuses to mix the two",
        "--engine stream, --quant none, or a larger card",
    ),
    Rule(
        "speculation_cache",
        lambda c: c.strategy.speculate != "none" and c.strategy.cache in ("static", "quantized"),
        "speculation takes rejected tokens back, which a static or quantized cache cannot do",
        "--cache dynamic or offloaded, or --speculate none",
        (),
    ),
    Rule(
        "speculation_state",
        lambda c: c.strategy.speculate != "none" and keeps_state(c.arch),
        "speculation takes rejected tokens back, which this model's recurrent layers cannot do",
        "--speculate none",
        (),
    ),
    Rule(
        "speculation_batch",
        lambda c: c.strategy.speculate != "none" and c.workload.sequences > 1,
        "speculation checks the draft of one sequence: each accepts another number of tokens",
        "--batch-size 1 and --concurrency 1, or --speculate none",
        (),
    ),
    Rule(
        "speculation_vocabulary",
        lambda c: c.drafts_other_words,
        "the draft model has another vocabulary than the model, so its tokens mean other text",
        "--draft with a smaller model of the same family, or --speculate lookup",
        (),
    ),
    Rule(
        "full_quantized",
        lambda c: c.train and c.workload.method == "full" and c.strategy.quant != "none",
        "full fine-tuning cannot change quantized weights",
        "--quant none, or --method qlora",
        ("quant",),
    ),
    Rule(
        "qlora_unquantized",
        lambda c: c.train and c.workload.method == "qlora" and c.strategy.quant == "none",
        "QLoRA trains adapters over quantized weights, and these are not",
        "--quant nf4 or int8, or --method lora",
        ("quant",),
    ),
    Rule(
        "lora_quantized",
        lambda c: c.train and c.workload.method == "lora" and not trains_on(c.strategy.quant, "lora"),
        "LoRA over these quantized weights is what QLoRA names",
        "--method qlora, or --quant none",
        ("quant",),
    ),
    Rule(
        "no_bf16",
        _lacks_bf16,
        "the card has no bf16: it takes compute capability 8.0",
        "--dtype fp16",
        (),
    ),
    Rule(
        "no_fp16",
        _too_old_for_fp16,
        "the card has no fp16 arithmetic: it takes compute capability 5.3",
        "--dtype fp32",
    ),
    Rule(
        "full_fp16",
        lambda c: c.train and c.workload.method == "full" and c.strategy.dtype == "fp16",
        "full fine-tuning of fp16 weights does not work: their gradients cannot be unscaled",
        "--dtype fp32, or a card with bf16",
        (),
    ),
    Rule(
        "old_for_nf4",
        _too_old_for("nf4"),
        "the card is too old for NF4: bitsandbytes needs compute capability 6.0",
        "--quant none, or a newer card",
        ("quant",),
    ),
    Rule(
        "old_for_int8",
        _too_old_for("int8"),
        "the card is too old for int8: bitsandbytes needs compute capability 7.5",
        "--quant nf4 or none, or a newer card",
        ("quant",),
    ),
    Rule(
        "paged_elsewhere",
        lambda c: c.train and c.strategy.optimizer.startswith("paged_") and _not_nvidia(c),
        "paged optimizers need CUDA's managed memory",
        "--optimizer adamw_8bit or adamw_torch_fused",
    ),
    Rule(
        "rmsprop_bf16",
        lambda c: c.train and _rmsprop_without_kernel(c),
        "bitsandbytes has no 32-bit rmsprop for bf16 gradients, and small tensors take it under 8 bits too",
        "--optimizer adamw_8bit, or --adapter-dtype fp32",
    ),
    Rule(
        "flash_attention_without_card",
        lambda c: _flash_attention(c) and not c.cards,
        "flash_attention_2 runs on cards only",
        "--attention sdpa",
    ),
    Rule(
        "flash_attention_old",
        lambda c: _flash_attention(c) and c.weaker_than("8.0"),
        "the card is too old for flash_attention_2: it takes compute capability 8.0",
        "--attention sdpa",
    ),
    Rule(
        "flash_attention_fp32",
        lambda c: _flash_attention(c) and c.strategy.dtype == "fp32",
        "flash_attention_2 computes in bf16 and fp16 only",
        "--attention sdpa, or --dtype bf16",
    ),
    Rule(
        "flash_attention_heads",
        lambda c: _flash_attention(c) and _wide_heads(c),
        "flash_attention_2 takes heads of at most 256 features, and this model has wider ones",
        "--attention sdpa",
    ),
    Rule(
        "flash_attention_sinks",
        lambda c: _flash_attention(c) and has_sinks(c.arch),
        "flash_attention_2 leaves out the attention sinks of this model",
        "--attention eager",
    ),
    Rule(
        "liger_inference",
        lambda c: _liger(c) and not c.train,
        "liger kernels are used in training only",
        "--kernels torch",
    ),
    Rule(
        "liger_without_card",
        lambda c: _liger(c) and (not c.cards or _not_nvidia(c)),
        "liger kernels need a CUDA card",
        "--kernels torch",
    ),
    Rule(
        "liger_old",
        lambda c: _liger(c) and c.weaker_than("8.0"),
        "the card is too old for liger: Triton supports compute capability 8.0 and later",
        "--kernels torch",
    ),
    Rule(
        "liger_system",
        lambda c: _liger(c) and not (c.machine.host.system or "Linux").startswith("Linux"),
        "liger kernels are built for Linux",
        "--kernels torch",
    ),
    Rule(
        "liger_model",
        lambda c: _liger(c) and c.arch.model_type not in liger_model_types(),
        "liger has no kernels for this architecture",
        "--kernels torch",
    ),
    Rule(
        "cache_stays",
        lambda c: not c.train and c.strategy.cache == "offloaded" and not c.cards,
        "an offloaded cache leaves the card for RAM, and there is no card",
        "--cache dynamic",
    ),
    Rule(
        "static_offload",
        lambda c: not c.train and c.strategy.cache == "static" and c.offloads,
        "a static cache is there to record decode steps, and layers that come to the card in each cannot be",
        "--cache dynamic",
    ),
    Rule(
        "static_recurrent",
        lambda c: c.strategy.cache == "static" and any(k.attention.kind == "recurrent" for k in c.arch.kinds),
        "layers with a recurrent state have no static cache",
        "--cache dynamic",
    ),
    Rule(
        "stored_precision",
        lambda c: _by_bitsandbytes(c) and STORED.get(c.arch.pretrained_quantization) != c.strategy.quant,
        "the checkpoint is quantized already and runs as it is, in NF4 or int8: what it lost stays lost",
        "--quant with the precision it is stored in, or a checkpoint in 16 bits",
        ("quant",),
    ),
    Rule(
        "stored_experts",
        lambda c: _by_bitsandbytes(c) and c.strategy.quant_experts == "nf4",
        "the checkpoint is quantized already, and its fused experts are not",
        "--quant-experts none, or a checkpoint in 16 bits",
    ),
    Rule(
        "no_fused_experts",
        lambda c: c.strategy.quant_experts == "nf4" and not fused_experts(c.arch),
        "the model has no fused experts to quantize",
        "--quant-experts none",
    ),
    Rule(
        "experts_in_own_code",
        lambda c: c.strategy.quant_experts == "nf4" and c.arch.model_type not in numerics().shared_code,
        "transformers runs this architecture's experts in code of its own, which takes no quantized ones",
        "--quant-experts none",
    ),
    Rule(
        "experts_alone",
        lambda c: c.strategy.quant_experts == "nf4" and c.strategy.quant != "nf4",
        "experts are quantized to NF4 together with the other weights",
        "--quant nf4, or --quant-experts none",
    ),
    Rule(
        "nothing_to_offload",
        lambda c: c.train and c.strategy.activation_offload and not c.strategy.gradient_checkpointing,
        "activation offload moves checkpoints, and checkpointing is off",
        "--gradient-checkpointing",
    ),
    Rule(
        "activations_stay",
        lambda c: c.train and c.strategy.activation_offload and not c.cards,
        "activation offload moves checkpoints off the card, and there is no card",
        "no --activation-offload",
    ),
)


def broken_rule(case: Case) -> Rule | None:
    """The first rule that excludes a strategy, None if it is possible."""
    return next((rule for rule in RULES if rule.excludes(case)), None)


def is_legal(arch: Architecture, machine: Machine, workload: Workload, strategy: Strategy) -> bool:
    """Whether a strategy is possible for a job on a machine."""
    return broken_rule(Case(arch, machine, workload, strategy)) is None
