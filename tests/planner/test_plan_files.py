"""plan.json on disk: written whole, read back equal, and refused in one line when it cannot be trusted."""

import json
import os
import stat

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_fakes import QWEN_7B, card, estimate, profile

from planner.errors import BadPlan
from planner.files import write_atomically
from planner.plan import LARGEST_PLAN_BYTES, make_plan, plan_bytes, read_plan, write_plan
from planner.types import Workload

PLAN = make_plan(profile(QWEN_7B), card("rtx-3090", 1, 64, 8), Workload(task="train"), estimator=estimate)
BYTES = plan_bytes(PLAN)


def write(folder, data) -> str:
    path = folder / "plan.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return str(path)


def refused(path) -> BadPlan:
    with pytest.raises(BadPlan) as caught:
        read_plan(path)
    text = f"{caught.value} {caught.value.hint or ''}"
    assert "\n" not in text and len(text) < 800
    assert caught.value.exit_code == 2
    return caught.value


def test_a_plan_reads_back_as_it_was(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    assert read_plan(path) == PLAN
    assert path.read_bytes() == BYTES
    write_plan(PLAN, path)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_is_laid_out_for_people():
    assert BYTES.endswith(b"}\n") and BYTES.startswith(b'{\n  "schema": "fitwright.plan/1",\n')
    assert msgspec.json.decode(BYTES)["digest"] == PLAN.digest


def test_laid_out_anew_is_not_edited(tmp_path):
    assert read_plan(write(tmp_path, json.loads(BYTES))) == PLAN


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "no JSON"),
        (BYTES[: len(BYTES) // 2], "no JSON"),
        (BYTES + b"x", "no JSON"),
        (b"\x00\x01", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b'{"schema": NaN}', "no JSON"),
        (b'{"a":' * 20000, "no JSON"),
        (b"[" * 20000 + b"]" * 20000, "no JSON"),
        (b"[]", "no plan"),
        (b"null", "no plan"),
        (b'"x"', "no plan"),
        (b"{}", "no plan"),
        (b'{"schema": 5}', "no plan"),
        (b'{"schema": "fitwright.run/1"}', "no plan"),
        (b'{"schema": "fitwright.plan/2"}', "another version"),
        (b'{"schema": "fitwright.plan/1"}', "missing required field `model`"),
        (BYTES.replace(b'"quant": "nf4"', b'"quant": "int8"'), "changed"),
        (BYTES.replace(b'"rank": 1', b'"rank": 2'), "changed"),
        (BYTES.replace(b'"rank": 1', b'"rank": 1, "extra": 1'), "changed"),
        (BYTES.replace(PLAN.digest.encode(), b"0" * 64), "changed"),
    ],
)
def test_what_cannot_be_trusted_is_refused(tmp_path, data, word):
    assert word in str(refused(write(tmp_path, data)))


def test_a_field_of_the_wrong_type_is_named(tmp_path):
    fields = json.loads(BYTES)
    fields["candidates"][0]["rank"] = "first"
    assert "$.candidates[0].rank" in str(refused(write(tmp_path, fields)))


def test_another_version_says_what_to_do(tmp_path):
    error = refused(write(tmp_path, BYTES.replace(b"fitwright.plan/1", b"fitwright.plan/7")))
    assert "fitwright.plan/7" in str(error) and "planner plan" in (error.hint or "")


def test_what_is_no_file_is_refused(tmp_path):
    assert "no such plan" in str(refused(tmp_path / "none.json"))
    assert "folder" in str(refused(tmp_path))
    assert "no such plan" in str(refused(tmp_path / "none" / "plan.json"))
    refused(tmp_path / ("x" * 5000))
    refused("a\x00b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no file" in str(refused(tmp_path / "pipe"))


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "plan.json"
    with open(path, "wb") as file:
        file.truncate(LARGEST_PLAN_BYTES + 1)
    assert "larger than" in str(refused(path))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_and_nothing_else_is_raised(tmp_path_factory, data):
    at = data.draw(st.integers(0, len(BYTES) - 1))
    cut = data.draw(st.integers(0, 30))
    new = data.draw(st.binary(max_size=8))
    damaged = BYTES[:at] + new + BYTES[at + cut :]
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_bytes(damaged)
    try:
        plan = read_plan(path)
    except BadPlan as error:
        assert "\n" not in str(error)
    else:
        # Only the space between tokens may change unnoticed.
        assert plan == PLAN


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=VALUES)
def test_any_value_in_any_field_is_refused_and_nothing_else_is_raised(tmp_path_factory, data, value):
    fields = json.loads(BYTES)
    node = fields
    while True:
        key = data.draw(
            st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1)
        )
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 4)) == 0:
            break
        node = inner
    same = node[key] == value and type(node[key]) is type(value)
    node[key] = value
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(fields))
    try:
        read_plan(path)
    except BadPlan as error:
        assert "\n" not in str(error)
    else:
        assert same


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_plan(PLAN, path)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        write_plan(PLAN, tmp_path / "none" / "plan.json")


@pytest.mark.skipif(os.name != "posix", reason="permissions are of POSIX")
def test_permissions_are_those_of_any_new_file(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_text("x")
    write_atomically(ours, b"x")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    ours.chmod(0o600)
    write_atomically(ours, b"y")
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600
