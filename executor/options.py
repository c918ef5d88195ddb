"""What the command line asks of one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE = {"full": 5e-5, "lora": 2e-4, "qlora": 2e-4}
"""Peak rates where none is given: transformers' default, and the customary fourfold for adapters.

The customary 2e-5 of a full fine-tune is for fp32 weights. Of bf16 ones of the usual size (0.02), rounding
leaves 70 % where they are at a step of 2e-5 and 43 % at 5e-5."""

NOT_SETTINGS = frozenset(
    {
        "plan",  # known by its digest
        "output",
        "offline",
        "restart",
        "json",
        "debug",
        "report_to",
        "save_steps",
        "vram_cap_bytes",
        "preflight",
        "pack",
    }
)
"""Options that change where results go, what is shown or what is tried, but no number that is computed. Any
option added later is a setting until it is named here."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `executor run` and `rehearse`. None: as the plan says, or the library's default."""

    plan: Path
    rehearse: bool = False
    output: Path | None = None
    candidate: int | None = None
    engine: str | None = None
    resident_layers: int | None = None
    vram_cap_bytes: int | None = None
    max_steps: int | None = None
    seed: int = 0
    offline: bool = False
    restart: bool = False
    trust_remote_code: bool = False
    deterministic: bool = False
    preflight: bool = True
    pack: bool = False
    json: bool = False
    debug: bool = False
    # inference
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    max_new_tokens: int | None = None
    greedy: bool = False
    temperature: float | None = None
    top_p: float | None = None
    # training
    dataset: Path | None = None
    learning_rate: float | None = None
    lr_schedule: str = "linear"
    warmup_ratio: float = 0.0
    epochs: float = 1.0
    save_steps: int | None = None
    eval_split: float = 0.0
    packing: bool = False
    report_to: str = "none"

    def settings(self) -> dict[str, Any]:
        """Everything that changes what a run computes; a run is resumed only under the same settings."""
        values = {k: v for k, v in asdict(self).items() if k not in NOT_SETTINGS}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
