"""Typed facts: what a profile file holds, and the structure that a model's facts describe.

Two levels, kept apart on purpose:

* `ModelProfile`, `GpuProfile`, `Precision` are what the data files hold: bare facts with their source.
* `Architecture` is what `profiles.architecture` derives from a model's facts: every tensor of the model
  by module, as transformers builds it. All arithmetic (parameter counts, bytes, KV cache, activations)
  reads this and nothing else, so a model the catalogue does not know goes through the same code.

Units: bytes and counts are `int`; rates carry `_per_s`. Shapes follow torch (`Linear` weight: outputs x
inputs).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

# --------------------------------------------------------------------------- structure of a model


class Linear(Struct, frozen=True):
    """One `torch.nn.Linear`: what bitsandbytes quantizes and what peft's `all-linear` adapts."""

    name: str
    """Module path inside its layer as transformers names it, e.g. `self_attn.q_proj`."""
    inputs: int
    outputs: int
    bias: bool = False
    transposed: bool = False
    """The weight is stored inputs x outputs (GPT-2's `Conv1D`), which bitsandbytes and peft treat alike."""
    quantized: bool = True
    """False where bitsandbytes leaves it in the compute dtype: transformers replaces exactly `nn.Linear` and
    `Conv1D`, no subclass of theirs (Falcon's), and nothing that `_keep_in_fp32_modules` names."""

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


class Parameter(Struct, frozen=True):
    """A tensor that is no `nn.Linear` weight: a router, stacked experts, a convolution, attention sinks."""

    name: str
    shape: tuple[int, ...]
    float32: bool = False
    """Kept in float32 by transformers whatever dtype is asked for (`_keep_in_fp32_modules`)."""
    buffer: bool = False
    """A registered buffer: takes memory, is not counted as a parameter."""
    persistent: bool = True
    """False for a buffer that is worked out anew and in no checkpoint (a causal mask, a table of sines)."""
    boolean: bool = False
    """One byte an element, whatever the dtype."""

    @property
    def parameters(self) -> int:
        """Elements, 0 for a buffer."""
        return 0 if self.buffer else self.elements

    @property
    def elements(self) -> int:
        """Elements whether or not they count as parameters."""
        n = 1
        for size in self.shape:
            n *= size
        return n


class Norm(Struct, frozen=True):
    """A normalisation layer over `size` features."""

    name: str
    size: int
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    weight: bool = True

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.size * (int(self.weight) + int(self.bias))


class LatentAttention(Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank queries and keys/values."""

    kv_rank: int
    q_rank: int | None
    rope_dim: int
    nope_dim: int


class RecurrentState(Struct, frozen=True):
    """What a linear-attention or state-space layer keeps per sequence instead of a KV cache."""

    conv_dim: int
    """Channels of the short convolution whose last inputs are kept."""
    conv_kernel: int
    state_elements: int
    """Elements of the recurrent state per sequence (heads x key dim x value dim)."""
    state_float32: bool = True
    chunk: int = 0
    """Tokens that a state-space scan with one decay a head (Mamba 2) takes at a time; 0 for other mixers."""


class Attention(Struct, frozen=True):
    """The token mixer of one layer."""

    kind: Literal["full", "sliding", "chunked", "latent", "recurrent", "cross", "none"]
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    """Features of one query/key head (for latent attention: nope_dim + rope_dim)."""
    value_dim: int = 0
    """Features of one value head; equals head_dim except under latent attention."""
    window: int | None = None
    """Tokens a sliding or chunked layer looks back on; None for all."""
    softcap: bool = False
    """Attention logits are capped (Gemma 2): sdpa is not exact, eager is transformers' default."""
    rope: bool = True
    linears: tuple[Linear, ...] = ()
    norms: tuple[Norm, ...] = ()
    """Norms inside attention (q_norm, k_norm, low-rank norms)."""
    parameters: tuple[Parameter, ...] = ()
    latent: LatentAttention | None = None
    state: RecurrentState | None = None
    shares_kv: bool = False
    """Reuses an earlier layer's keys and values (Gemma 3n, Gemma 4): owns no cache."""


class Experts(Struct, frozen=True):
    """Routed experts of a mixture-of-experts layer."""

    count: int
    per_token: int
    intermediate: int
    fused: bool
    """True: 3-D `nn.Parameter` stacks, which bitsandbytes and peft's all-linear leave alone
    (transformers >= 5). False: one `nn.Linear` set per expert, in `linears`."""
    parameters: tuple[Parameter, ...] = ()
    """The fused stacks with their biases."""
    linears: tuple[Linear, ...] = ()
    """Linears of ONE expert when not fused."""
    router: tuple[Linear | Parameter, ...] = ()


class FeedForward(Struct, frozen=True):
    """The channel mixer of one layer: dense linears (or shared experts) and routed experts, if any."""

    kind: Literal["gated", "plain", "moe", "none"]
    activation: str = "silu"
    intermediate: int = 0
    """Features between the dense linears (for MoE: of the shared experts together; 0 if none)."""
    linears: tuple[Linear, ...] = ()
    norms: tuple[Norm, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    experts: Experts | None = None


class Layer(Struct, frozen=True):
    """One decoder layer."""

    attention: Attention
    feed_forward: FeedForward
    norms: tuple[Norm, ...] = ()
    """Norms on the residual stream: two for Llama, four for Gemma 2 (before and after each mixer)."""
    residual: Literal["sequential", "parallel"] = "sequential"
    residual_scale: bool = False
    """What the layer adds to the residual stream is multiplied by a constant first (Granite, MiniCPM)."""
    parameters: tuple[Parameter, ...] = ()
    """Anything else: layer scalars, per-layer inputs."""
    linears: tuple[Linear, ...] = ()


class Tower(Struct, frozen=True):
    """A vision or audio encoder with its projector: counted, resident, idle in text-only work."""

    name: str
    blocks: int = 0
    block_linears: tuple[Linear, ...] = ()
    block_parameters: tuple[Parameter, ...] = ()
    linears: tuple[Linear, ...] = ()
    parameters: tuple[Parameter, ...] = ()


class Architecture(Struct, frozen=True):
    """Every tensor of a decoder-only language model, as transformers builds it.

    `kinds` holds each distinct layer once; `order` gives the kind of every layer, first to last.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    embeddings: tuple[Parameter, ...]
    """Token embedding first (vocabulary x hidden), then learned positions and others."""
    final_norm: Norm | None
    head: Linear | None
    """The output projection; None when it shares the token embedding's weight."""
    max_position_embeddings: int | None = None
    logit_softcap: bool = False
    embedding_scale: bool = False
    """Embeddings are multiplied by a constant (Gemma): one more copy of the hidden state."""
    logit_scale: bool = False
    """Logits are multiplied or divided by a constant (Cohere, Granite)."""
    layers_path: str = "model.layers"
    """Module path of the decoder layers: layer i is `<layers_path>.<i>`."""
    linears: tuple[Linear, ...] = ()
    """Linears of the text model outside layers and head (Gemma 3n's per-layer projection)."""
    parameters: tuple[Parameter, ...] = ()
    """Other tensors of the text model outside layers (norms of projections, MTP modules that are loaded)."""
    towers: tuple[Tower, ...] = ()
    dtype: str = "bfloat16"
    """Dtype of the published checkpoint (torch_dtype)."""
    pretrained_quantization: str | None = None
    """`quantization_config.quant_method` of the published checkpoint (fp8, mxfp4, bitsandbytes-nf4, ...), if
    any."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.order)


# --------------------------------------------------------------------------- model facts


class Source(Struct, frozen=True, omit_defaults=True):
    """Where a fact was read."""

    what: str
    """Repository and commit, data sheet, or measurement file."""
    path: str | None = None
    licence: str | None = None


class Verification(Struct, frozen=True, omit_defaults=True):
    """How far the parameter count is confirmed."""

    status: Literal["exact", "explained", "unverified"]
    """exact: arithmetic = count of the real class = published. explained: differs from the published count
    for the reason in `note`. unverified: no published or counted value to hold it against."""
    note: str | None = None


class ModelProfile(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Facts of one model: one file `profiles/models/<family>/<id>.json`."""

    id: str
    name: str
    family: str
    repo_ids: tuple[str, ...]
    config: dict[str, Any]
    """The fields of config.json that decide shapes, memory and speed, under their own names."""
    parameters: int | None
    """Recorded parameter count (tied tensors once); None if never counted."""
    verification: Verification
    sources: tuple[Source, ...]
    context_tokens: int | None = None
    """Published context length; None if unknown."""
    active_parameters: int | None = None
    released: str | None = None
    defaulted: tuple[str, ...] = ()
    """Fields the config did not state and transformers' config class fills in."""
    same_as: str | None = None
    """Id of the sibling (base of a chat model) whose facts this name resolves to: the same tensors."""


# --------------------------------------------------------------------------- hardware facts


class GpuProfile(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Facts of one card or chip, under `profiles/gpus/<vendor>.json`. None means not known."""

    id: str
    name: str
    vendor: Literal["nvidia", "amd", "intel", "apple", "huawei"]
    memory_bytes: int
    """Total as nvidia-smi prints it where known, else nominal capacity (see `memory_basis`)."""
    memory_basis: Literal["nvidia_smi", "nominal", "live", "given"]
    """nvidia_smi: total as the driver prints it. nominal: capacity as sold. live: read from a card that the
    catalogue does not list. given: named by the user."""
    unified_memory: bool = False
    """Memory shared with the CPU (Apple, Grace, APUs)."""
    memory_type: str | None = None
    bandwidth_bytes_per_s: int | None = None
    bf16: bool | None = None
    """Computes in bfloat16; None where not known. A card may have it at a rate nobody published."""
    bf16_flops_per_s: int | None = None
    """Dense tensor-core rate with fp32 accumulation; None where there is no bf16 or no known rate."""
    fp16_flops_per_s: int | None = None
    """Dense tensor-core rate with fp32 accumulation, else the vector rate."""
    fp32_flops_per_s: int | None = None
    int8_ops_per_s: int | None = None
    fp8: bool = False
    fp4: bool = False
    compute_capability: str | None = None
    architecture: str | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    nvlink_bytes_per_s: int | None = None
    power_watts: int | None = None
    launch_date: str | None = None
    launch_price_usd: int | None = None
    form: str | None = None
    """desktop, laptop, workstation, datacenter (SXM, PCIe, OAM), chip."""
    display: bool = True
    """Has or usually drives a display: 512 MiB are held back for it by default."""
    aliases: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()


class Precision(Struct, frozen=True, kw_only=True):
    """A way to store linear weights: `profiles/precisions.json`."""

    id: str
    name: str
    bits: int
    block_size: int | None = None
    """Elements that share one scale; None for no scales or one scale a row."""
    scale_bits: int = 0
    """Bits of one scale: of a block, or of a row where `scale_per_row`."""
    scale_per_row: bool = False
    double_quant_block: int | None = None
    """Scales that share one second-level scale."""
    double_quant_scale_bits: int = 0
    skips: tuple[str, ...] = ()
    """Modules left in the compute dtype: `lm_head`, `embeddings`, `fused_experts`, ..."""
    least_compute_capability: str | None = None
    infer: bool = True
    trains: tuple[str, ...] = ()
    """Methods that can train on such weights: full, lora, qlora."""
    cpu: bool = True
    engine: str = "torch"
    source: str = ""
