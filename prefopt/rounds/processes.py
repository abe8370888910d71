"""What one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.errors import PrefoptError

T = TypeVar("T")


def from_main(work: Callable[[], T]) -> T:
    """Has the main process do something once all have come this far; all processes call this.

    Returns:
        What it returned, on every process.

    Raises:
        PrefoptError: It raised one; every process does, so that none waits for the others.
    """
    told: list[tuple[T | None, str | None]] = [(None, None)]
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        try:
            told = [(work(), None)]
        except PrefoptError as error:
            told = [(None, str(error))]
    broadcast_object_list(told)
    result, problem = told[0]
    if problem is not None:
        raise PrefoptError(problem)
    return result  # type: ignore[return-value]
