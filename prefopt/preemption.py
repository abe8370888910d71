"""SIGTERM as a cluster sends it before it takes a machine away: end soon, and lose nothing.

While data and models are loaded there is nothing to save, and the process ends at once. While it
trains, the signal is remembered until a safe point, where all processes agree to end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import current_thread, main_thread
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, once more, goes on


class Preempted(BaseException):
    """The run ends because SIGTERM asked for it; what it says is what is on disk.

    No Exception, as KeyboardInterrupt is none: libraries that try one thing after another while
    they load would go on with the next.
    """


@dataclass
class _Watch:
    process: int
    asked: bool = False
    waits: bool = False  # for a safe point


_watch: _Watch | None = None


@contextmanager
def watch_sigterm() -> Iterator[None]:
    """Has SIGTERM raise `Preempted` inside the block; the handler before it comes back after.

    Does nothing outside the main thread, where Python lets nobody set handlers.
    """
    global _watch
    if current_thread() is not main_thread():
        yield
        return
    _watch = _Watch(os.getpid())
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        _watch = None


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    watch = _watch
    if watch is None or watch.process != os.getpid():  # a forked worker: it is to end at once
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not watch.asked:
        watch.asked = True
        if not watch.waits:
            raise Preempted("nothing was trained since the last start")
        os.write(2, b"SIGTERM: ends at the next safe point\n")  # logging may hold its lock


def begin_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Has a data worker outlive SIGTERM, which clusters send to all processes of a job.

    One that ended would take the trainer along before its next safe point. Whoever loads data tells
    workers otherwise when they are to end.

    Args:
        then: What else is done as a worker begins.
        worker: Its number.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


def wait_for_safe_points() -> None:
    """Has SIGTERM wait from here on until :func:`leave_if_asked` is called.

    A run that has come to its last safe point, or has failed, ends as it would have: a launcher
    sends SIGTERM to all processes when the first one ends.
    """
    if _watch is not None:
        _watch.waits = True


def asked() -> bool:
    """Whether this process was asked to end."""
    return _watch is not None and _watch.asked


def leave_if_asked() -> None:
    """A safe point; all processes call this together.

    Raises:
        Preempted: On all of them, where any was asked to end.
    """
    if _watch is not None and _anywhere(_watch.asked):
        raise Preempted("all that was made is on disk")


def _anywhere(flag: bool) -> bool:
    import torch  # loaded by whoever has several processes
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState()
    if state.num_processes == 1:
        return flag
    count = reduce(torch.tensor([float(flag)], device=state.device), "sum")
    return bool(count.item())
