"""MODEL on the command line -> facts: a path, else a catalogue id, else a name on the Hub.

Aliases share facts, not weights: what the user named (Hub name, revision or local folder) is kept beside the
profile so that a plan can record it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from msgspec import Struct, structs

from planner.errors import BadConfig, UnknownModel
from planner.render.text import short
from profiles.schema import ModelProfile

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class ResolvedModel(Struct, frozen=True):
    """Facts of a model, and which weights the user meant."""

    profile: ModelProfile
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = None


def resolve(name: str, *, offline: bool = False) -> ResolvedModel:
    """The model called `name`.

    Errors: `UnknownModel` with the nearest names, `BadConfig` for a config.json that cannot be used.
    """
    if not name.strip():
        raise UnknownModel("MODEL is empty", "name one of `planner models`, or a folder with config.json")
    if _is_path(name):
        return _from_path(name)
    from profiles.catalogue import load_model

    try:
        profile = load_model(name)
    except UnknownModel as unknown:
        if _HUB_NAME.fullmatch(name):
            return _from_hub(name, offline)
        raise _with_folder_hint(name, unknown) from None
    return ResolvedModel(profile, repo_id=name if "/" in name else _repository(name, profile))


def _repository(name: str, profile: ModelProfile) -> str | None:
    """The repository of the catalogue entry of that name, whose facts may be those of a sibling."""
    from profiles.catalogue import all_models, model_ids

    wanted = name.strip().lower()
    if wanted != profile.id and wanted in model_ids():
        profile = next(model for model in all_models() if model.id == wanted)
    return profile.repo_ids[0] if profile.repo_ids else None


def _is_path(name: str) -> bool:
    if name.startswith(".") or name.endswith(".json"):
        return True
    separators = [s for s in (os.sep, os.altsep, "/") if s]
    return any(s in name for s in separators) and _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _from_path(name: str) -> ResolvedModel:
    from profiles.catalogue import profile_from_config
    from profiles.config import load_config_file

    if not _exists(name):
        raise BadConfig(
            f"no such file or folder: {short(name)}", "give a model folder or the path of its config.json"
        )
    config = load_config_file(name)
    folder = Path(name).resolve()
    folder = folder if folder.is_dir() else folder.parent
    profile = profile_from_config(config, short(folder.name) or "model")
    return ResolvedModel(profile, path=str(folder))


def _from_hub(name: str, offline: bool) -> ResolvedModel:
    from planner.hub import fetch
    from profiles.catalogue import profile_from_config
    from profiles.config import load_config_file

    found = fetch(name, offline=offline)
    config = load_config_file(found.config_path)
    source = f"{name} on the Hub at {found.revision}"
    profile = profile_from_config(
        config, name.rpartition("/")[2].lower(), name=name, repo_id=name, source=source
    )
    if found.parameters is not None:
        profile = structs.replace(profile, parameters=found.parameters)
    return ResolvedModel(profile, repo_id=name, revision=found.revision)


def _with_folder_hint(name: str, unknown: UnknownModel) -> UnknownModel:
    if _exists(name):
        return UnknownModel(str(unknown), f"for the folder of that name write ./{short(name)}")
    if name.startswith(("/", "~")):
        return UnknownModel(
            f"no such file or folder: {short(name)}", "give a model folder or its config.json"
        )
    return unknown
