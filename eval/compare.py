"""Win rate of one file of answers over another, under a trained judge."""

from __future__ import annotations

import json
import math
from typing import Any

from prefopt.data.rows import Prompt, parse_prompt
from prefopt.data.sources import read_rows
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.win_rate import win_rate
from prefopt.reward_models import load_judge

Answers = dict[tuple[str, int], tuple[Prompt, str]]


def compare_files(
    model: str, baseline: str, judge: str, kind: str = "reward_model"
) -> dict[str, Any]:
    """Compares answers, matched by prompt and sample, as ``prefopt generate`` writes them.

    Args:
        model: File of the model's answers.
        baseline: File of the baseline's answers to the same prompts.
        judge: The judge's folder or Hub id.
        kind: ``reward_model`` or ``preference_model``.

    Returns:
        ``win_rate`` and ``win_rate_ci`` in 0-100 over prompts, counts, and mean lengths in
        characters.

    Raises:
        PrefoptError: A file or the judge cannot be read, or the files answer different prompts.
    """
    ours, theirs = _read(model), _read(baseline)
    if ours.keys() != theirs.keys():
        alone = len(ours.keys() ^ theirs.keys())
        raise PrefoptError(
            f"{model} and {baseline} must answer the same prompts; {alone} answers have no "
            "counterpart (same prompt, same sample) in the other file"
        )
    keys = list(ours)
    prompts = [ours[key][0] for key in keys]
    a, b = [ours[key][1] for key in keys], [theirs[key][1] for key in keys]
    preferences = load_judge(kind, judge).prefer(prompts, a, b)
    rate = win_rate(preferences, groups=[key[0] for key in keys])
    return {
        "win_rate": rate.win_rate,
        "win_rate_ci": list(rate.ci),
        # of one prompt there is no standard error, and JSON knows no NaN
        "standard_error": None if math.isnan(rate.standard_error) else rate.standard_error,
        **{name: getattr(rate, name) for name in ("wins", "ties", "losses")},
        "prompts": rate.n,
        "mean_length": sum(map(len, a)) / len(a),
        "baseline_mean_length": sum(map(len, b)) / len(b),
        "judge": judge,
    }


def _read(path: str) -> Answers:
    answers: Answers = {}
    for where, row in read_rows(path):
        prompt, completion = parse_prompt(row, where), row.get("completion")
        if not isinstance(completion, str):
            raise DataError(where, "completion", f"found {completion!r}, expected text")
        key = (json.dumps(prompt, sort_keys=True), row.get("sample", 0))
        if key in answers:
            raise DataError(where, "prompt", "answered before in this file with the same sample")
        answers[key] = (prompt, completion)
    return answers
