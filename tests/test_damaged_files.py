"""A small part of `tests/campaigns/damaged_files.py`."""

import pytest

from campaigns import damaged_files


@pytest.mark.parametrize("name", damaged_files.KINDS)
def test_damaged_files_are_refused_or_harmless(tmp_path, name):
    counts, wrong = damaged_files.campaign(tmp_path, name, times=25, seed=1)
    assert not wrong
    assert counts["refused"] > 10 or name == "cache"


def test_the_campaign_can_tell(tmp_path, monkeypatch):
    """A reader that lets damage through is caught."""
    kind = damaged_files.KINDS["policy"]
    free = kind._replace(read=lambda folder: (folder / "policy.json").read_bytes())
    monkeypatch.setitem(damaged_files.KINDS, "free", free)
    assert damaged_files.campaign(tmp_path, "free", times=10, seed=0)[0]["wrong"] > 5
