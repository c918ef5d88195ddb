"""Write profiles/models/ from a folder of config.json files and an index of where they were read.

    python tools/import_models.py CATALOGUE_FOLDER profiles/models

The folder holds `models/INDEX.json` (one object a model: id, file, family, source, counts) and the files it
names. A profile keeps the fields that the architecture reader reads, and no others. `model_corrections.json`
says, by repository, what a source left out of a config, and how a count is explained where the index cannot
know; `model_dates.json` gives months of release by the longest beginning of an id.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from profiles.arithmetic import active_parameter_count, parameter_count
from profiles.catalogue import has_experts
from profiles.config import config_facts
from profiles.errors import BadConfig
from profiles.names import model_id, stem
from profiles.schema import Architecture, ModelProfile, Source, Verification
from profiles.traits import merge

HERE = Path(__file__).parent
MTP = "multi-token-prediction layers, which transformers does not load"


def verification(row: dict[str, Any], correction: dict[str, Any], counted: int) -> Verification:
    """What our count was held against. Errors: `SystemExit` where it disagrees and nobody said why."""
    published, class_count, match = row["published_parameter_count"], row["parameters_meta"], row["match"]
    if "note" in correction:
        return Verification(correction.get("status", "explained"), correction["note"])
    if published == counted:
        return Verification("exact")
    if class_count != counted:
        raise SystemExit(f"counted {counted}, the class has {class_count}")
    if match == "mismatch":
        return Verification("unverified", f"the published count, {published}, is not of the complete weights")
    if published is None:
        return Verification(
            "explained", "counted from the architecture; no published count to hold it against"
        )
    return Verification("explained", _reason(match, published - counted, counted))


def corrected(config: dict[str, Any], correction: dict[str, Any]) -> dict[str, Any]:
    """The config with nested fields put back where they belong and missing ones added."""
    outer = ("architectures", "model_type", "quantization_config")
    if "nest" in correction:
        inner = {k: v for k, v in config.items() if k not in outer}
        config = {**{k: config[k] for k in outer if k in config}, correction["nest"]: inner}
    return merge(config, correction.get("config", {}))


def _reason(match: str, extra: int, counted: int) -> str:
    if match == "exact_tied_head_stored_twice":
        return f"the published count holds the tied output head a second time ({extra} more)"
    if match == "exact_for_unquantised_or_chat_sibling":
        return "the published count is of packed low-bit weights; the unquantized sibling's equals ours"
    if match == "exact_with_mtp" or extra > counted // 1000:
        return f"the published count holds {extra} more for {MTP}"
    if extra > 0:
        return f"the published count holds {extra} more for buffers and scales, which are no parameters"
    return f"the published count holds {-extra} fewer"


def released(name: str) -> str | None:
    """Month of release, by the longest known beginning of the id."""
    dates = json.loads((HERE / "model_dates.json").read_text())
    known = [start for start in dates if name.startswith(start)]
    return dates[max(known, key=len)] if known else None


def source(row: dict[str, Any]) -> Source:
    """Where the config was read."""
    if row["source_repo"] is None:
        return Source("reconstructed from the config of a sibling and published dimensions")
    licence = row["source_licence"]
    return Source(
        f"{row['source_repo']}@{row['source_commit'][:12]}",
        row["source_path"],
        licence.split(" (")[0] if licence and len(licence) < 80 else None,
    )


def read_profile(
    folder: Path, row: dict[str, Any], correction: dict[str, Any]
) -> tuple[ModelProfile, Architecture]:
    """Profile and architecture of one model."""
    config = corrected(json.loads((folder / row["file"]).read_text()), correction)
    arch, facts, defaulted = config_facts(config)
    counted = parameter_count(arch)
    limit = None if row["context_altered_by_source"] else arch.max_position_embeddings
    return ModelProfile(
        id=model_id(row["id"]),
        name=row["id"].split("/")[1],
        family=row["family"],
        repo_ids=(row["id"],),
        config=facts,
        parameters=counted,
        verification=verification(row, correction, counted),
        sources=(source(row),),
        context_tokens=row["published_context_length"] or limit,
        active_parameters=active_parameter_count(arch) if has_experts(arch) else None,
        released=released(model_id(row["id"])),
        defaulted=defaulted,
    ), arch


def siblings(read: list[tuple[ModelProfile, Architecture]]) -> dict[str, str]:
    """Models whose tensors are those of a catalogued base model: id to the id of the base.

    A sibling with a longer context than the base has facts of its own and stays apart.
    """
    same = {}
    for profile, arch in read:
        for base, other in read:
            longer = (profile.context_tokens or 0) > (base.context_tokens or 0)
            if base.id != profile.id and base.id == stem(profile.id) and not longer and _alike(arch, other):
                same[profile.id] = base.id
    return same


def _alike(one: Architecture, other: Architecture) -> bool:
    return msgspec.structs.replace(one, max_position_embeddings=None) == msgspec.structs.replace(
        other, max_position_embeddings=None
    )


def formatted(value: Any, indent: str = "") -> str:
    """JSON with one field a line and lists of plain values on one line."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = ",\n".join(f"{inner}{json.dumps(k)}: {formatted(v, inner)}" for k, v in value.items())
        return f"{{\n{lines}\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(len(str(item)) > 200 for item in value):
        inner = indent + " "
        return "[\n" + ",\n".join(f"{inner}{formatted(item, inner)}" for item in value) + f"\n{indent}]"
    return json.dumps(value)


def write(folder: Path, profile: ModelProfile) -> None:
    """One file, written whole or not at all."""
    target = folder / profile.family / f"{profile.id}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(formatted(msgspec.to_builtins(profile)) + "\n")
    os.replace(temporary, target)


def main(catalogue: str, output: str) -> int:
    """Import every model; report the ones that cannot be described."""
    folder, failed = Path(catalogue), 0
    known = json.loads((HERE / "model_corrections.json").read_text())
    read = []
    for row in json.loads((folder / "models/INDEX.json").read_text()):
        try:
            read.append(read_profile(folder, row, known.get(row["id"], {})))
        except (BadConfig, SystemExit) as error:
            failed += 1
            print(f"{row['id']}: {error}")
    same = siblings(read)
    for profile, _ in read:
        write(Path(output), msgspec.structs.replace(profile, same_as=same.get(profile.id)))
    print(f"{len(read)} profiles, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
