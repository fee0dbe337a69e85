"""The collector of cycles is paused for a while, and only where it was on."""

from __future__ import annotations

import gc

import pytest

from potstill.storage.files.collecting import without_collection


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was_also_after_an_error(was_on: bool) -> None:
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with without_collection():
            assert not gc.isenabled()
            with without_collection():
                pass
            assert not gc.isenabled()
        assert gc.isenabled() is was_on
        with pytest.raises(ValueError, match="of the work"), without_collection():
            raise ValueError("of the work")
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()
