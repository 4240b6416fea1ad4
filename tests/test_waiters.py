"""Waiting for what a lock guards to change."""

import threading
import time

from imgfs.waiters import Waiters

WAIT_SECONDS = 10.0


def test_nobody_need_wait_for_what_holds_already() -> None:
    lock = threading.Lock()
    with lock:
        assert Waiters(lock).wait_for(lambda: True, 0)


def test_the_wait_ends_when_the_time_is_over() -> None:
    lock = threading.Lock()
    waiters = Waiters(lock)
    with lock:
        assert not waiters.wait(0.01)
        assert not waiters.wait_for(lambda: False, 0.01)
        waiters.wake()  # nobody


def test_all_who_wait_look_again_when_something_changes() -> None:
    lock = threading.Lock()
    waiters = Waiters(lock)
    changed = False
    asked: list[int] = []
    done: list[bool] = []

    def holds() -> bool:
        asked.append(threading.get_ident())
        return changed

    def wait() -> None:
        with lock:
            done.append(waiters.wait_for(holds, WAIT_SECONDS))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    while len(set(asked)) < 3:
        time.sleep(0.001)
    with lock:  # each has asked, and let go of the lock by waiting
        changed = True
        waiters.wake()
    for thread in threads:
        thread.join()
    assert done == [True] * 3
    assert time.monotonic() - started < WAIT_SECONDS / 2
