"""Every command does what it did when tests/goldens.json was recorded: `python tests/goldens.py` records it again."""

import json

import goldens
import pytest


@pytest.fixture(scope="session")
def recorder(tmp_path_factory):
    """One folder for all groups, as later commands use earlier runs."""
    return goldens.Recorder(tmp_path_factory.mktemp("goldens"))


@pytest.mark.parametrize("group", goldens.GROUPS)
def test_nothing_has_changed(recorder, group):
    recorded = json.loads(goldens.FILE.read_text(encoding="utf-8"))
    exact = recorded["machine"] == goldens.machine()
    lines = goldens.differences(recorded["groups"][group], recorder.group(group), exact, group)
    more = [f"and {len(lines) - 40} more"] if len(lines) > 40 else []
    assert not lines, "\n".join(["", *lines[:40], *more])
