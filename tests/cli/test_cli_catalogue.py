"""Every model of the catalogue gets its page, within 80 columns and with nothing cut."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest

from planner.cli import main
from profiles.catalogue import model_ids

FAMILIES = sorted({model.split("-")[0] for model in model_ids()})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_can_be_checked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for model in model_ids():
        if model.split("-")[0] != family:
            continue
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["check", model, "--gpu", "rtx-3060-12gb"])
        assert code in (0, 1) and err.getvalue() == "", (model, err.getvalue())
        page = out.getvalue()
        assert "…" not in page and max(map(len, page.splitlines())) <= 80, (model, page)
