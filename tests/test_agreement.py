"""Agreement of judges: hand-derived numbers and the published statistics of real verdicts."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from prefopt.errors import PrefoptError
from prefopt.eval.agreement import cohen_kappa, positional_agreement, two_order_accuracy

JUDGE = Path(__file__).parents[2] / "shared" / "data" / "judge"
needs_verdicts = pytest.mark.skipif(not JUDGE.exists(), reason="shared/data/judge is absent")


def test_a_judge_that_takes_the_first_place_is_half_right_and_never_agrees() -> None:
    labels, original, swapped = [1, 2, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2]
    assert two_order_accuracy(labels, original, swapped) == 0.5
    assert positional_agreement(original, swapped) == 0


def test_by_hand() -> None:
    labels, original, swapped = [1, 2, 1, 2], [1, 2, 2, None], [1, 2, 2, 2]
    assert two_order_accuracy(labels, original, swapped) == (2 / 4 + 3 / 4) / 2
    assert positional_agreement(original, swapped) == 3 / 4
    # p = 1/2; the first says 1 twice of 4, the second once: e = (2 * 1 + 2 * 3) / 16
    assert cohen_kappa([1, 1, 2, 2], [1, 2, 2, 2]) == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    assert cohen_kappa([1, 2], [2, 1]) == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))


def test_verdicts_that_do_not_pair_up_are_refused() -> None:
    for first, second in (([1], [1, 2]), ([], [])):
        with pytest.raises(PrefoptError, match=f"found {len(first)} and {len(second)} verdicts"):
            positional_agreement(first, second)


@needs_verdicts
def test_llmbar_is_reproduced() -> None:
    """All 150 cells of judge, prompt and subset that princeton-nlp/LLMBar 900616b publishes."""
    cells: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    with gzip.open(JUDGE / "llmbar_verdicts.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            cell = row["subset"], row["evaluator"], row["strategy"]
            verdicts = row["winner_original_order"], row["winner_swapped_order"]
            cells[cell].append((row["label"], *verdicts))
    published = json.loads((JUDGE / "llmbar_published_statistics.json").read_text())
    assert len(published) == len(cells) == 150
    for cell in published:
        rows = cells[cell["subset"], cell["evaluator"], cell["strategy"]]
        assert len(rows) == cell["n"]
        labels, original, swapped = zip(*rows, strict=True)
        accuracy = 100 * two_order_accuracy(labels, original, swapped)
        agreement = 100 * positional_agreement(original, swapped)
        # percentages stand there with all digits, so only the last bits of a float may differ
        assert accuracy == pytest.approx(cell["accuracy_avg_published"], rel=0, abs=1e-12)
        assert agreement == pytest.approx(cell["positional_agreement_published"], rel=0, abs=1e-12)


@needs_verdicts
def test_pandalm_has_not_changed() -> None:
    """Regression values of shared/data/judge; kappa also by scikit-learn."""
    rows = [json.loads(line) for line in (JUDGE / "pandalm_verdicts.jsonl").open()]
    votes = list(zip(*(row["votes"] for row in rows), strict=True))
    kappas = []
    for a, b in combinations(votes, 2):
        kappas.append(cohen_kappa(a, b))
        assert kappas[-1] == pytest.approx(cohen_kappa_score(a, b))
    assert [round(kappa, 3) for kappa in kappas] == [0.852, 0.879, 0.862]
    majority = [row["majority"] for row in rows]
    gpt = [{"1": 1, "2": 2, "Tie": 0}.get(row["gpt35"]) for row in rows]
    for verdicts, agreement in ((gpt, 0.6977), ([row["pandalm7b"] for row in rows], 0.6677)):
        assert round(positional_agreement(majority, verdicts), 4) == agreement
