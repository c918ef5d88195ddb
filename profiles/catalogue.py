"""The model catalogue: one JSON file a model under `profiles/models/<family>/<id>.json`.

`load_model` opens that one file and nothing else. A config.json the catalogue does not know becomes a profile
through `profile_from_config`, by the same reader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from profiles.errors import BadConfig, UnknownModel
from profiles.names import LONGEST_NAME, model_id, nearest, stem
from profiles.schema import Architecture, ModelProfile, Source, Verification

FOLDER = Path(__file__).parent / "models"


@lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    """Path of every profile by id, from the folders' listings alone."""
    found = {}
    for family in os.scandir(FOLDER):
        if family.is_dir():
            for entry in os.scandir(family.path):
                if entry.name.endswith(".json"):
                    found[entry.name[:-5]] = entry.path
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _stems() -> dict[str, list[str]]:
    """Ids by stem: chat and base models of one name together, the shortest (the base) first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(_files(), key=lambda name: (len(name), name)):
        groups.setdefault(stem(name), []).append(name)
    return groups


def model_ids() -> tuple[str, ...]:
    """Ids of every catalogued model, in alphabetical order."""
    return tuple(_files())


@lru_cache(maxsize=512)
def _read(name: str) -> ModelProfile:
    with open(_files()[name], "rb") as file:
        return msgspec.json.decode(file.read(), type=ModelProfile)


def all_models() -> tuple[ModelProfile, ...]:
    """Every profile, in alphabetical order of ids."""
    return tuple(_read(name) for name in _files())


def _candidates(name: str) -> list[str]:
    """Ids that a name may mean, best first: the id itself, then its siblings."""
    wanted = model_id(name)
    exact = [wanted] if wanted in _files() else []
    return list(dict.fromkeys([*exact, *_stems().get(stem(wanted), [])]))


def load_model(name: str) -> ModelProfile:
    """The profile of a catalogue id (`qwen2.5-7b`) or of a repository (`Qwen/Qwen2.5-7B`), in any case.

    Chat, instruct and base siblings of one name have the same tensors and resolve to the same facts; a name
    with an organisation matches only models of that organisation.

    Errors: `UnknownModel`; the hint names the nearest.
    """
    text = name.strip()
    if 0 < len(text) <= LONGEST_NAME:
        owner = text.rsplit("/", 1)[0].lower() if "/" in text else None
        for candidate in _candidates(text):
            profile = _read(candidate)
            if owner is None or owner in {repo.split("/")[0].lower() for repo in profile.repo_ids}:
                return profile if profile.same_as is None else _read(profile.same_as)
    raise UnknownModel(f"unknown model {_shown(text)}", _hint(text))


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:56]}...'"


def _hint(text: str) -> str:
    near = nearest(text, model_ids())
    if near:
        return f"the nearest known: {', '.join(near)}; or give a config.json"
    return "`planner models` lists the catalogue; a folder with config.json or ORG/NAME of the Hub works too"


def profile_from_config(
    config: Mapping[str, Any],
    id: str,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    source: str = "config.json",
) -> ModelProfile:
    """A profile of a model the catalogue does not know, from its config.json.

    The parameter count is our own arithmetic, with no published value to hold it against.

    Errors: `BadConfig`.
    """
    from profiles.arithmetic import active_parameter_count, parameter_count
    from profiles.config import config_facts

    arch, facts, defaulted = config_facts(config)
    total, active = parameter_count(arch), active_parameter_count(arch)
    if total <= 0:
        raise BadConfig("the config describes a model without parameters")
    return ModelProfile(
        id=id,
        name=name or id,
        family=arch.model_type,
        repo_ids=(repo_id,) if repo_id else (),
        config=facts,
        parameters=total,
        verification=Verification("unverified", "counted from its config.json alone"),
        sources=(Source(source),),
        context_tokens=arch.max_position_embeddings,
        active_parameters=active if has_experts(arch) else None,
        defaulted=defaulted,
    )


def has_experts(arch: Architecture) -> bool:
    """Whether any layer routes tokens to experts."""
    return any(layer.feed_forward.experts is not None for layer in arch.kinds)
