"""Threads for jobs, of which some can't be had."""

import threading

import pytest

from imgfs.workers import Workers
from tests.conftest import wait_until


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)


@pytest.mark.usefixtures("no_more_threads")
def test_a_job_that_nobody_can_do_is_refused_and_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, done = Workers(2, "test"), []
    with pytest.raises(RuntimeError):
        workers.submit(done.append, "refused")
    monkeypatch.undo()
    workers.submit(done.append, "taken")
    wait_until(lambda: done)
    workers.close(lambda: False)
    assert done == ["taken"]


def test_a_job_waits_for_a_thread_that_is_busy_where_no_other_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, done, go = Workers(2, "test"), [], threading.Event()
    workers.submit(go.wait, 30)

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    workers.submit(done.append, "later")
    assert done == []
    go.set()
    wait_until(lambda: done)
    workers.close(lambda: False)
