"""The published schemas are those of the types, and the examples are files of those types."""

import importlib.util
from pathlib import Path

import msgspec
import pytest

from planner.plan import read_plan
from planner.types import Estimate, Machine, RunReport

ROOT = Path(__file__).parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("schemas_tool", ROOT / "tools" / "schemas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()


@pytest.mark.parametrize("path", sorted(TOOL.files()), ids=lambda path: path.name)
def test_schemas_follow_the_types(path):
    assert path.read_bytes() == TOOL.files()[path], "run `python tools/schemas.py`"


def test_examples_are_of_their_types():
    folder = ROOT / "schemas" / "examples"
    assert sorted(each.stem for each in folder.glob("*.json")) == sorted(TOOL.TYPES)
    assert read_plan(folder / "plan.json").candidates
    for name, kind in (("machine", Machine), ("run", RunReport)):
        value = msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=kind)
        assert value.schema == f"fitwright.{name}/1"


def test_the_estimate_is_described_as_it_is_printed():
    printed = msgspec.json.decode((ROOT / "schemas" / "examples" / "estimate.json").read_bytes())
    described = TOOL.schema("estimate")
    assert set(printed) == set(described["properties"])
    assert set(described["required"]) <= set(printed)
    lines = sum(line["bytes"] for line in printed["disk_components"])
    assert printed["disk_bytes"] == lines > 0
    fields = {**printed, "disk": {"components": printed["disk_components"]}}
    assert msgspec.convert(fields, Estimate).verdict in ("fits", "tight")


@pytest.mark.parametrize("name", sorted(TOOL.TYPES))
def test_every_reference_leads_somewhere(name):
    schema = TOOL.schema(name)
    text = msgspec.json.encode(schema).decode()
    for part in text.split('"$ref":"#/$defs/')[1:]:
        assert part.split('"')[0] in schema["$defs"]
    assert schema["required"][0] == "schema"
