"""The fuzz targets by name, and how to run one of them.

python tests/fuzz_targets.py [TARGET ...] [--examples 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import (
    evaluations,
    files,
    pairing,
    recipes,
    replies,
    rows,
    stores,
    templates,
    trees,
)
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    "recipe": recipes.RECIPES,
    "recipe_file": recipes.RECIPE_FILES,
    "rows": rows.ROWS,
    "json_file": files.JSON_FILES,
    "data_file": files.DATA_FILES,
    "parquet_file": files.PARQUET_FILES,
    "folder": files.FOLDERS,
    "template": templates.TEMPLATES,
    "tree": trees.TREES,
    "tree_parts": trees.TREE_PARTS,
    "pairs": pairing.PAIRS,
    "any_judgement": pairing.ANY_JUDGEMENTS,
    "win_rates": pairing.WIN_RATES,
    "rollouts": stores.ROLLOUTS,
    "judgements": stores.JUDGEMENTS,
    "stored_file": stores.STORED_FILES,
    "cut_file": stores.CUT_FILES,
    "reply": replies.REPLIES,
    "reply_bytes": replies.REPLY_BYTES,
    "answers": evaluations.ANSWERS,
    "annotations": evaluations.ANNOTATIONS,
    "difficulties": evaluations.DIFFICULTIES,
    "questions": evaluations.QUESTIONS,
    "report": evaluations.REPORTS,
}


def run_target(name: str, examples: int, seed: int = 0) -> int:
    """Tries inputs on one target.

    Args:
        name: Of `TARGETS`.
        examples: How many inputs to draw.
        seed: Which ones.

    Returns:
        How many were tried, those that once failed among them.

    Raises:
        AssertionError: Or whatever else the smallest failing input raised; a note has the input.
    """
    target = TARGETS[name]
    tried = 0
    for value in target.found.values():
        target.check(value)
        tried += 1

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(target.inputs)
    def check(value: Any) -> None:
        nonlocal tried
        tried += 1
        target.check(value)

    check()
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.targets or TARGETS:
        start = time.monotonic()
        tried = run_target(name, options.examples, options.seed)
        print(f"{name:15} {tried:7,} inputs {time.monotonic() - start:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
