"""Versions of the libraries a run would use here. Reads package metadata, imports nothing."""

from __future__ import annotations

from importlib import metadata

from planner.types import Stack

LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")


def installed_libraries() -> dict[str, str]:
    """Exact versions by distribution; what is not installed is missing."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def stack_of(libraries: dict[str, str]) -> Stack:
    """Major and minor versions of the libraries whose behaviour counts; empty where one is not installed."""
    names = ("torch", "transformers", "bitsandbytes", "peft")
    return Stack(*(".".join(libraries.get(name, "").split("+")[0].split(".")[:2]) for name in names))
