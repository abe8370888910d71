"""Random inputs for every parser and builder: nothing but errors of our own, and invariants hold.

The same 150 inputs a target in every run, so that a failure is the fault of a change, and no more,
because there are two dozen targets: together they take 20 seconds of a core. More:
``python tests/fuzz_targets.py TARGET --examples 10000 --seed 1``, or ``fuzz_atheris.py``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS, run_target

EXAMPLES = 150
SLOW = {"report": 5, "recipe": 75}  # a page with its plots takes a fifth of a second


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}: {what}")
        for name, target in TARGETS.items()
        for what, value in target.found.items()
    ],
)
def test_what_fuzzing_found(name: str, value: Any) -> None:
    TARGETS[name].check(value)


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs(name: str) -> None:
    assert run_target(name, SLOW.get(name, EXAMPLES), seed=0) > 0


def test_a_failure_names_the_smallest_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: tuple[list[int], Any]) -> None:
        assert not case[0]

    monkeypatch.setitem(
        TARGETS, "broken", type(TARGETS["tree"])(TARGETS["tree_parts"].inputs, check)
    )
    with pytest.raises(AssertionError) as caught:
        run_target("broken", 100, seed=0)
    assert "value=([0], [])" in "".join(caught.value.__notes__)


def test_atheris_entry_says_what_is_missing() -> None:
    script = Path(__file__).with_name("fuzz_atheris.py")
    hidden = (
        "import sys, runpy; sys.modules['atheris'] = None; sys.argv = ['x', 'tree']; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "skipped: atheris is missing" in done.stdout
