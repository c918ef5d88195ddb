"""The estimators set side by side with ours: what is installed, and what each claims to predict."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Tier = Literal["process", "allocated", "decode_tokens_per_s"]


class Rival(Struct, frozen=True, kw_only=True):
    """One tool, run by `adapters/<name>.py` with the python of a virtual environment of its own."""

    name: str
    package: str
    """What pip installs, with its exact version; empty: it comes with the executor's own libraries."""
    tier: Tier
    """What its number is compared with."""
    needs: tuple[str, ...] = ()
    """What the package forgets to ask for."""
    lent: bool = False
    """It needs torch and transformers: those of the running python are put on its path."""
    settings: dict[str, str] = {}
    """Environment variables."""


RIVALS = (
    Rival(name="fitcheck", package="fitcheck-llm==0.3.1", tier="process"),
    Rival(name="ftuneai", package="ftuneai==0.4.1", tier="process", needs=("typer", "rich", "pyyaml")),
    Rival(name="accelerate", package="", tier="allocated", lent=True),
    Rival(
        name="deepspeed",
        package="deepspeed==0.19.8",
        tier="allocated",
        needs=("wheel", "setuptools"),
        lent=True,
        settings={"DS_ACCELERATOR": "cpu"},
    ),
    Rival(name="hf-mem", package="hf-mem==0.5.6", tier="allocated"),
    Rival(name="llmfit", package="llmfit==1.1.17", tier="decode_tokens_per_s"),
)
