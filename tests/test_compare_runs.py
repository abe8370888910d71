"""Runs side by side: what is known of each, what is missing, and what must not be compared."""

from __future__ import annotations

import json

import pytest
from report_folders import evaluated, write_lines

from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.eval.compare_runs import compare_runs


def test_rows_are_of_the_last_evaluation(tmp_path):
    one = evaluated(tmp_path / "one", rates=(55.0, 65.0))
    result = compare_runs([str(one)])
    assert result["runs"]["one"] == {
        "algorithm": "online_dpo",
        "win_rate": 65.0,
        "win_rate_ci": [60.0, 70.0],
        "lc_win_rate": 63.0,
        "prompts": 12,
        "mean_length": 18.0,
        "baseline_mean_length": 8.0,
        "kl": 3.0,
        "kl_step": 30.0,
        "seconds": 90.0,
        "steps": 40,
    }
    assert result["warnings"] == result["missing"] == []
    assert result["report"] is None


def test_kl_of_the_evaluation_itself_counts_before_what_was_logged(tmp_path):
    one = evaluated(tmp_path / "one", rates=(55.0,))
    path = one / "evaluations" / "0001" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kl": 2.25}))
    row = compare_runs([str(one)])["runs"]["one"]
    assert row["kl"] == 2.25
    assert "kl_step" not in row


def test_missing_values_are_named_with_a_way_to_get_them(tmp_path, capsys):
    one = evaluated(tmp_path / "one")
    write_lines(tmp_path / "two" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert main(["compare", str(one), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("missing") == 6 + 3
    assert "win rate is missing for two: no evaluation" in shown
    assert "KL is missing for two" in shown
    assert "time is missing for two: no summary.json" in shown
    assert "* one: the KL is of step 30" in shown


def test_different_judges_are_warned_of_loudly(tmp_path, capsys):
    runs = [
        str(evaluated(tmp_path / "one", judge="runs/a")),
        str(evaluated(tmp_path / "two", judge="runs/b")),
    ]
    assert main(["compare", *runs]) == 0
    warning = capsys.readouterr().err
    assert "WARNING: Win rates are not comparable, judges differ" in warning
    assert "runs/a" in warning
    assert main(["compare", *runs, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


def test_judge_that_was_moved_is_the_same_judge(tmp_path):
    runs = []
    for name in ("one", "two"):
        runs.append(evaluated(tmp_path / name, judge=f"runs/{name}"))
        for path in runs[-1].glob("evaluations/*/result.json"):
            result = json.loads(path.read_text())
            result["judge"]["weights"] = "a hash"
            path.write_text(json.dumps(result))
    assert compare_runs([str(run) for run in runs])["warnings"] == []
    path.write_text(json.dumps(result | {"judge": result["judge"] | {"weights": "another"}}))
    (told,) = compare_runs([str(run) for run in runs])["warnings"]
    assert "judges differ" in told


def test_early_end_is_told_with_its_reason(tmp_path, capsys):
    one = evaluated(tmp_path / "one")
    summary = json.loads((one / "summary.json").read_text())
    (one / "summary.json").write_text(json.dumps(summary | {"stopped": "it <got> worse"}))
    assert main(["compare", str(one), "--out", str(tmp_path / "out")]) == 0
    assert "one ended early: it <got> worse." in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "one ended early: it &lt;got&gt; worse." in page


def test_page_of_a_comparison(tmp_path):
    one = evaluated(tmp_path / "a" / "dpo")
    two = evaluated(tmp_path / "b" / "dpo", rates=(50.0, 75.0))
    write_lines(tmp_path / "other" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    folders = [str(one), str(two), str(tmp_path / "other")]
    result = compare_runs(folders, str(tmp_path / "out"))
    assert list(result["runs"]) == ["a/dpo", "b/dpo", "other"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert result["report"] == str(tmp_path / "out" / "report.html")
    for shown in ("3 runs compared", "75.0 [70.0, 80.0]", "win rate is missing for other"):
        assert shown in page
    names = {path.stem for path in (tmp_path / "out" / "plots").iterdir()}
    assert {"win-rate", "win-rate-against-kl", "win-rate-against-time", "length"} <= names
    assert not (one / "report.html").exists()


def test_refusals_say_what_to_give_instead(tmp_path):
    one = str(evaluated(tmp_path / "one"))
    for folders, out, message in (
        ([str(tmp_path / "nowhere")], None, "no such folder"),
        ([str(tmp_path)], None, "not a run: .* takes a folder of runs"),
        ([one, one], None, "stands twice"),
        ([one], one, "is one of the runs"),
    ):
        with pytest.raises(PrefoptError, match=message):
            compare_runs(folders, out)
