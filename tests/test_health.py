"""The monitor of datadirs that do not answer: what goes wrong around it does not end it."""

from pathlib import Path

import pytest

from imgfs.calls import Call
from imgfs.config import DatadirConfig
from imgfs.health import Health
from imgfs.timed import TimedDatadir
from tests.conftest import wait_until


def test_monitor_goes_on_where_those_told_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datadir = TimedDatadir(DatadirConfig(str(tmp_path)))
    told: list[list[Call]] = []

    def stuck(calls: list[Call]) -> None:
        told.append(calls)
        if len(told) == 1:
            raise RuntimeError("can't start new thread")

    number = datadir.calls.begin()
    health = Health([datadir], 0.1, lambda _: None, stuck)
    try:
        wait_until(lambda: len(told) > 1, "another look")
    finally:
        datadir.calls.end(number)
        health.close()
        datadir.close()
    assert "can't start new thread" in caplog.text
    assert [call.number for call in told[1]] == [number]
