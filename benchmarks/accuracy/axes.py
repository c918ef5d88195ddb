"""What the grid varies: models with how many cells each gets, and the choices of every setting.

`SHARES` gives a choice its weight in the draw; a value listed twice is drawn twice as often.
"""

from __future__ import annotations

from typing import Final

MODELS: Final[dict[str, tuple[int, int]]] = {
    # dense, grouped or multi-query or full heads, tied and untied, biases, vocabularies of 32k to 262k
    "qwen2.5-0.5b": (6, 3),
    "qwen2.5-1.5b": (4, 3),
    "qwen2.5-3b": (3, 2),
    "qwen2.5-7b": (5, 5),
    "qwen2.5-14b": (2, 2),
    "qwen2.5-32b": (1, 1),
    "qwen1.5-0.5b-chat": (2, 2),
    "qwen3-0.6b": (3, 2),
    "qwen3-4b": (3, 3),
    "qwen3-8b": (2, 2),
    "llama-3.2-1b": (5, 2),
    "llama-3.2-3b": (2, 2),
    "llama-3.1-8b": (4, 4),
    "llama-2-7b": (1, 2),
    "tinyllama-1.1b-chat-v1.0": (2, 1),
    "smollm2-360m-instruct": (2, 1),
    "smollm3-3b": (2, 1),
    "mistral-7b-v0.1": (2, 2),
    "ministral-8b-instruct-2410": (1, 1),
    "internlm3-8b-instruct": (1, 1),
    "granite-3.3-2b-instruct": (2, 2),
    "phi-2": (2, 1),
    "phi-3-mini-4k-instruct": (2, 2),
    "phi-4-mini-instruct": (1, 1),
    "phi-4": (1, 1),
    "gemma-2b": (2, 2),
    "gemma-2-2b": (4, 2),
    "gemma-2-9b": (1, 1),
    "gemma-3-1b-it": (3, 2),
    "gemma-3-4b-it": (2, 2),
    "gemma-3-27b-it": (1, 1),
    "gemma-4-e2b-it": (2, 2),
    "glm-4-9b-0414": (1, 1),
    "falcon-7b": (1, 2),
    "stablelm-2-1.6b": (2, 1),
    "starcoder2-7b": (1, 1),
    "olmo-2-0425-1b": (2, 1),
    "olmo-3-7b-instruct": (1, 1),
    "hunyuan-1.8b-instruct": (1, 1),
    "ernie-4.5-0.3b-pt": (2, 1),
    "minicpm3-4b": (2, 1),
    # mixtures of experts, latent attention
    "deepseek-v2-lite": (1, 2),
    "gpt-oss-20b": (1, 1),
    "phi-mini-moe-instruct": (1, 1),
    # not in the catalogue: facts in configs/
    "olmoe-7b": (2, 2),
    "qwen2moe-14b": (1, 1),
    "granitemoe-1b": (2, 2),
    "gptneox-1.4b": (1, 1),
    "opt-1.3b": (1, 1),
    "bloom-1.7b": (1, 1),
    "gpt2-0.8b": (1, 1),
    "cohere2-7b": (1, 1),
    "nemotron-4b": (1, 1),
    "helium-2b": (1, 1),
    "arcee-4b": (1, 1),
    "apertus-7b": (1, 1),
    "exaone4-1b": (1, 1),
    "glm-2b": (1, 1),
    "olmo-1b": (1, 1),
    "persimmon-5b": (1, 1),
    "lfm2-1.2b": (1, 1),
    "falconh1-0.5b": (0, 1),
    "qwen3next-3b": (0, 1),
}
"""Training cells and generating cells by model."""

METHODS = ("qlora", "qlora", "lora", "lora", "full")
SEQ_LEN = (512, 1024, 1024, 2048, 2048, 4096, 8192, 16384)
BATCH = (1, 1, 1, 2, 2, 4, 8, 16)
RANK = (8, 8, 8, 4, 16, 32, 64, 256)
DROPOUT = (0.05, 0.05, 0.0, 0.1)
TARGETS = ("all-linear", "all-linear", "all-linear", "attention")
VARIANT = ("lora",) * 7 + ("dora", "dora", "rslora")
ADAPTER_DTYPE = ("fp32", "fp32", "fp32", "bf16")
CHECKPOINTING = (True, True, False)
ACCUMULATION = (1,) * 9 + (2,)
ATTENTION = ("sdpa",) * 6 + ("eager",)
ENDING = (("full", "torch"),) * 5 + (("fused", "torch"), ("full", "liger"))
UPCAST = (False, False, False, False, True)
QLORA_QUANT = ("nf4",) * 5 + ("int8",)
DTYPE = ("bf16",) * 9 + ("fp32",)
ADAPTER_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "paged_adamw_8bit", "adamw_8bit")

PROMPT = (512, 1024, 2048, 2048, 4096, 8192, 16384, 32768)
NEW = (16, 32, 64)
INFER_QUANT = ("none", "none", "none", "nf4", "nf4", "int8")
CACHE = ("dynamic", "dynamic", "dynamic", "dynamic", "static", "offloaded", "quantized")

FULL_MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b-it", "qwen3-0.6b", "smollm2-360m-instruct")
"""Every optimizer of the contract fine-tunes one of these whole."""

OFFLOADED = (
    ("qwen2.5-7b", "mixed_offload", 9, 1024),
    ("llama-3.1-8b", "mixed_offload", 8, 512),
    ("qwen3-4b", "mixed_offload", 4, 2048),
    ("mistral-7b-v0.1", "mixed_offload", 12, 2048),
    ("gemma-2-2b", "mixed_offload", 4, 512),
    ("qwen2.5-3b", "disk_offload", 4, 512),
    ("llama-3.2-3b", "disk_offload", 4, 1024),
)
"""Model, placement, GiB of the card that layers are placed for, prompt."""

DATA = (
    ("qwen2.5-1.5b", "lora", "ragged", 1024, 4),
    ("llama-3.2-1b", "qlora", "ragged", 2048, 4),
    ("qwen2.5-7b", "qlora", "ragged", 1024, 2),
    ("gemma-2-2b", "qlora", "ragged", 512, 4),
    ("phi-3-mini-4k-instruct", "lora", "ragged", 1024, 2),
    ("qwen2.5-0.5b", "lora", "packed", 2048, 2),
    ("llama-3.2-1b", "qlora", "packed", 1024, 4),
    ("mistral-7b-v0.1", "qlora", "packed", 2048, 1),
    ("qwen2.5-7b", "infer", "ragged", 1024, 8),
    ("llama-3.1-8b", "infer", "ragged", 2048, 4),
    ("gemma-2-2b", "infer", "ragged", 2048, 4),
    ("phi-3-mini-4k-instruct", "infer", "ragged", 1024, 8),
)
"""Model, method or `infer`, data, tokens, batch."""

TIMED_INFER = (
    ("qwen2.5-0.5b", "none", 1, 1024),
    ("llama-3.2-1b", "none", 1, 1024),
    ("llama-3.2-3b", "none", 8, 1024),
    ("qwen2.5-7b", "none", 1, 2048),
    ("qwen2.5-7b", "nf4", 1, 2048),
    ("llama-3.1-8b", "none", 1, 8192),
    ("llama-3.1-8b", "nf4", 8, 1024),
    ("llama-3.1-8b", "int8", 1, 1024),
    ("qwen2.5-14b", "none", 1, 1024),
    ("qwen2.5-32b", "nf4", 1, 1024),
    ("gemma-2-9b", "none", 1, 2048),
    ("mistral-7b-v0.1", "none", 16, 512),
    ("phi-4", "none", 1, 1024),
    ("olmoe-7b", "none", 1, 1024),
    ("deepseek-v2-lite", "none", 1, 512),
)
"""Model, precision, batch, prompt."""

TIMED_TRAIN = (
    ("qwen2.5-0.5b", "full", 4, 1024),
    ("llama-3.2-1b", "full", 4, 2048),
    ("qwen2.5-1.5b", "lora", 2, 2048),
    ("llama-3.2-3b", "lora", 2, 2048),
    ("qwen2.5-7b", "qlora", 1, 2048),
    ("qwen2.5-7b", "lora", 1, 2048),
    ("llama-3.1-8b", "qlora", 2, 2048),
    ("gemma-2-2b", "qlora", 2, 1024),
    ("mistral-7b-v0.1", "lora", 2, 1024),
    ("qwen2.5-14b", "qlora", 1, 2048),
    ("phi-3-mini-4k-instruct", "qlora", 2, 2048),
    ("qwen3-4b", "lora", 1, 4096),
)
"""Model, method, batch, tokens of a sequence."""
