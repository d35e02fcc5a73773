"""The garbage collector is paused inside, and afterwards as it was before."""

from __future__ import annotations

import gc

import pytest

from partitioner.program.pause_collector import collector_paused


def test_the_outermost_enables_it_again() -> None:
    assert gc.isenabled()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_enables_it_again() -> None:
    @collector_paused()
    def fails() -> None:
        assert not gc.isenabled()
        raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert gc.isenabled()


def test_it_stays_off_where_the_caller_had_turned_it_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
