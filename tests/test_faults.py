"""A few of the faults that ``make faults`` injects by the hundred (docs/reliability.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.table import BEGIN, END, Event, Fault, fault, markdown, phases, write_page

TESTS = Path(__file__).parent


# about a minute on two idle cores: some thirty runs, most of them stopped midway
@pytest.mark.slow
def test_faults_lose_nothing(tmp_path: Path) -> None:
    output = tmp_path / "faults.json"
    chosen = ["--only", "kills,disk,corruption,lock", "--cases", "dpo,online_dpo,ppo"]
    words = [*chosen, "--scale", "0.1", "--output", str(output), "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "faults", *words],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert output.exists(), done.stderr[-4000:]
    kinds = json.loads(output.read_text()).values()
    assert [kind["losses"] + kind["broken"] for kind in kinds] == [[], [], [], []]
    assert done.returncode == 0
    injected = {row["name"]: row["injected"] for kind in kinds for row in kind["faults"]}
    # one on each of two clocks
    assert all(injected[f"killed: {name}"] == 2 for name in ("dpo", "online_dpo", "ppo")), injected
    assert injected["pre-empted (SIGTERM)"] == 6
    corrupt = [count for name, count in injected.items() if name.startswith("corrupt file")]
    assert sum(corrupt) > 0


def test_the_table_counts_events_and_those_that_lost_something(tmp_path: Path) -> None:
    events = [
        Event("SIGKILL", "dpo", "training", "exit -9"),
        Event("SIGKILL", "dpo", "loading", "exit -9", lost=("final/model.safetensors differs",)),
        Event("SIGKILL", "dpo", "training", "exit -9"),
    ]
    row = fault("killed: dpo", events, phases(events))
    assert row == Fault("killed: dpo", 3, 1, "loading 1, training 2")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page, markdown([row]))
    *_, line = page.read_text().split(END)[0].strip().splitlines()
    assert line == "| killed: dpo | 3 | 1 | loading 1, training 2 |"
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
