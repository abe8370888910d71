"""The report of made-up run folders: complete, self-contained, and safe to open."""

from __future__ import annotations

import csv
import json
import re
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image
from report_folders import (
    HOSTILE,
    Page,
    collection,
    evaluated,
    figures,
    report,
    summary,
    training,
    write_lines,
)

from prefopt.errors import PrefoptError
from prefopt.eval.evaluations import differences, read_evaluations
from prefopt.eval.plots import COLOURS, style_of
from prefopt.eval.report import write_report
from prefopt.eval.run_folder import read_runs


@pytest.fixture(scope="module")
def shown_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, Page]]:
    """A collection and its report, for tests that only look at it."""
    folder = collection(tmp_path_factory.mktemp("shown") / "quickstart")
    return folder, report(folder)


@pytest.fixture
def shown(shown_folder: tuple[Path, tuple[str, Page]]) -> tuple[str, Page]:
    return shown_folder[1]


def test_collection_shows_every_part(shown):
    text, page = shown
    assert page.headings[0] == "quickstart"
    for heading in ("Algorithms", "Judge:", "Training", "logps", "Samples"):
        assert heading in page.headings
    for shown in ("seed 3", "63.1 [58.9, 67.2]", "2 min 05 s", "0.780", "short", "torch"):
        assert shown in page.text
    assert "algorithm: dpo" in page.text
    # Bars, frontier, calibration; three runs of loss, rewards, logps; kl laid over each other.
    assert len(figures(text)) == 3 + 3 * 3 + 1


def test_plots_are_well_formed_and_take_the_pages_ink(shown):
    text, _ = shown
    for svg in figures(text):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert "#000000" not in svg
        assert "#010203" not in svg


def test_ids_stand_once(shown):
    ids = re.findall(r' id="([^"]+)"', shown[0])
    assert len(ids) > 20
    assert len(set(ids)) == len(ids)


def test_hostile_answers_stay_text(shown):
    text, page = shown
    assert HOSTILE not in text
    assert page.tags.count("script") == 1
    assert page.text.count(HOSTILE) == 2


def test_hostile_names_stay_text(tmp_path):
    name = '"><img src=x onerror=alert(1)>$_{x}$'
    found = {"algorithms": {name: {"win_rate": 60.0, "kl": 1.0, f"{name}2": 1.5}}}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, f"{name}/x": s} for s in range(3)])
    text, page = report(tmp_path)
    assert "img" not in page.tags
    assert name in page.text
    for svg in figures(text):
        ElementTree.fromstring(svg)


def test_text_that_utf8_cannot_spell_is_replaced(tmp_path):
    line = '{"prompt": "broken \\ud83d emoji", "answers": {"dpo": "\\udc00"}}'
    (tmp_path / "samples.jsonl").write_text(line)
    _, page = report(tmp_path)
    assert "broken ? emoji" in page.text


def test_page_loads_nothing(shown):
    text, page = shown
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert "default-src 'none'" in text


def test_long_files_and_samples_stay_under_three_megabytes(tmp_path):
    for run in range(9):
        write_lines(tmp_path / f"run{run}" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
        (tmp_path / f"run{run}" / "recipe.yaml").write_text(f"# {run}\n" + "'<&>'\n" * 9_000)
    answers = {f"run{run}": "<'\">" * 1_500 for run in range(9)}
    write_lines(tmp_path / "samples.jsonl", [{"prompt": "p", "answers": answers}] * 500)
    text, page = report(tmp_path)
    assert len(text.encode()) < 3_000_000
    assert page.text.count("more characters") > 20
    assert "of 500 samples" in page.text


def test_too_many_curves_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.eval.report_curves.CURVE_BYTES", 20_000)
    rows = [{"step": s, **{f"metric_{m}": s * m + s for m in range(12)}} for s in range(20)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text, page = report(tmp_path)
    left_out = 12 - len(figures(text))
    assert 0 < left_out < 12
    assert f"{left_out} panels of curves are left out" in page.text


def test_long_run_is_averaged_not_cut(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": s, "loss": 1.0 + s % 2} for s in range(20_000)]
    )
    text, _ = report(tmp_path)
    assert len(figures(text)[0]) < 20_000
    assert "15000" in figures(text)[0]


def test_half_written_last_line_is_ignored(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in range(1, 9)])
    whole, _ = report(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 9, "loss": 0.')
    assert report(tmp_path)[0] == whole


def test_broken_line_in_the_middle_is_reported(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", training())
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "lo{"step": 1}\n' + path.read_text())
    _, page = report(tmp_path)
    assert "metrics.jsonl: 1 of 9 lines are not JSON objects" in page.text


def test_resumed_run_shows_the_later_value_of_a_repeated_step(tmp_path):
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 777.0}, {"step": 2, "loss": 4.0}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    resumed, page = report(tmp_path)
    assert "777" not in page.text
    write_lines(tmp_path / "metrics.jsonl", [rows[0], rows[2]])
    assert report(tmp_path)[0] == resumed


def test_lines_without_a_step_are_drawn_in_order(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.5}])
    unnumbered, _ = report(tmp_path)
    rows = [{"step": s, "loss": v} for s, v in enumerate((3.0, 2.0, 1.5))]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert report(tmp_path)[0] == unnumbered


def test_values_that_are_not_finite_are_named(tmp_path):
    rows = [*training(), {"step": 9, "loss": float("nan")}, {"step": 10, "loss": float("inf")}]
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    _, page = report(tmp_path / "run")
    assert "run: values that are not finite, not drawn: loss (2)." in page.text


def test_numbers_and_lines_beyond_all_bounds_are_left_out(tmp_path):
    lines = [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "loss": 1' + 400 * "0" + "}",  # no float
        '{"step": 3, "loss": 1' + 5000 * "0" + "}",  # more digits than Python reads
        '{"step": 4, "loss": -1e308}',  # the axis would not fit into a float
        100_000 * "[",
        '{"step": 5, "loss": 0.5}',
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text, page = report(run)
    assert "run: values that are not finite, not drawn: loss (2)." in page.text
    assert "run/metrics.jsonl: 2 of 6 lines are not JSON objects; left out." in page.text
    assert len(figures(text)) == 1


def test_byte_order_mark_is_no_fault(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", training())
    (tmp_path / "summary.json").write_text('{"seed": 3}')
    plain = report(tmp_path)[0]
    for path in (tmp_path / "metrics.jsonl", tmp_path / "summary.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert report(tmp_path)[0] == plain


def test_values_of_another_kind_are_not_shown(tmp_path):
    bins = [{"confidence": 0.7, "accuracy": a, "count": 9} for a in (0.6, 1.2, -0.1)]
    found = {
        "algorithms": {"dpo": {"win_rate": "high", "seconds": []}, "sft": {"win_rate": 50.5}},
        "judge": {"calibration": bins},
        "setting": {"algorithms": {"dpo": 3}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(found))
    _, page = report(tmp_path)
    assert "50.5" in page.text
    assert len((tmp_path / "plots" / "calibration-judge.csv").read_text().splitlines()) == 2


def test_many_judges_and_long_descriptions_stay_under_three_megabytes(tmp_path):
    folder = evaluated(tmp_path, rates=(60.0,), judge="judge " * 600_000)
    bins = [{"confidence": 0.5 + k / 100, "accuracy": 0.6, "count": 9} for k in range(40)]
    judges = {f"judge {n}": {"calibration": bins} for n in range(100)}
    found = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(found | judges))
    text, page = report(folder)
    assert len(text.encode()) < 3_000_000
    assert "88 judges are left out to keep the page small." in page.text


def test_new_algorithm_needs_no_code(tmp_path):
    found = summary()
    found["algorithms"]["my_new_method"] = {"win_rate": 71.0, "kl": 2.5, "regret": 0.125}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    text, page = report(tmp_path)
    bars, frontier = figures(text)[:2]
    assert "my_new_method" in bars
    assert "my_new_method" in frontier
    assert "regret" in page.text
    assert "0.125" in page.text


def test_names_that_the_font_lacks_are_no_warning(tmp_path):
    (tmp_path / "summary.json").write_text('{"algorithms": {"日本": {"win_rate": 60.0}}}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, _ = report(tmp_path)
    assert "日本" in figures(text)[0]


def test_algorithm_keeps_its_colour_everywhere(shown):
    text, _ = shown
    swatches = re.findall(r'color: (#\w+)"></span>(\w+)', text)
    assert len({colour for colour, name in swatches if name == "dpo"}) == 1
    assert sum(name == "dpo" for _, name in swatches) >= 5
    assert all(COLOURS[1] in svg for svg in figures(text)[:2])


def test_styles_of_many_algorithms_differ():
    styles = [style_of(index) for index in range(21)]
    assert len({(style.colour, style.dash) for style in styles}) == 21
    assert len({(style.colour, style.marker) for style in styles}) == 21


def test_missing_parts_are_left_out(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [{"prompt": "Hi", "answers": {"dpo": "Hello"}}])
    text, page = report(tmp_path)
    assert [h for h in page.headings if h != tmp_path.name] == ["Samples"]
    assert not figures(text)


def test_algorithm_without_win_rate_has_a_row_and_no_bar(tmp_path):
    found = {"algorithms": {"sft": {"seconds": 30.0}, "dpo": {"win_rate": 60.0}}}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    text, page = report(tmp_path)
    (bars,) = figures(text)
    assert "30.0 s" in page.text
    assert "dpo" in bars
    assert "sft" not in bars


def test_single_run_draws_evaluation_on_the_training_curve(tmp_path):
    rows = [*training(), {"step": 4, "eval_loss": 0.9}, {"step": 8, "eval_loss": 0.8}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text, page = report(tmp_path)
    assert "evaluation" in figures(text)[0]
    # loss, rewards, logps and kl
    assert len(figures(text)) == 4
    assert "may fall while the margin" in page.text


def test_same_folder_gives_the_same_page_and_leaves_nothing_aside(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(60.0,))
    first, _ = report(folder)
    files = {path: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert report(folder)[0] == first
    assert files == {path: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert not list(folder.rglob(".*"))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(PrefoptError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(PrefoptError, match="nothing to report on"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON object"),
        ('{"algorithms": []}', "'algorithms' is a list"),
        ('{"algorithms": {"dpo": 3}}', r"'algorithms\.dpo' is a int"),
    ],
)
def test_bad_summary_is_refused(tmp_path, text, message):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(PrefoptError, match=message):
        write_report(tmp_path)


def test_every_plot_stands_beside_the_page_in_three_formats(shown_folder):
    folder, (text, _) = shown_folder
    names = {path.stem for path in (folder / "plots").iterdir()}
    assert len(names) == len(figures(text))
    for name in names:
        svg = (folder / "plots" / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        assert "currentColor" not in svg
        assert "#010203" not in svg
        image = Image.open(folder / "plots" / f"{name}.png").convert("RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getextrema() != ((255, 255),) * 3
        assert len((folder / "plots" / f"{name}.csv").read_text().splitlines()) > 1
    assert {
        "algorithms-win-rate",
        "curve-loss-dpo",
        "curve-kl",
        "calibration-reward_model",
    } <= names


def test_csv_has_every_number_of_a_curve_that_is_drawn_as_averages(tmp_path):
    rows = [{"step": s, "loss": 0.1 + s % 7} for s in range(1, 501)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    report(tmp_path)
    with (tmp_path / "plots" / "curve-loss.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(float(row["step"]), float(row["value"])) for row in found] == [
        (row["step"], row["loss"]) for row in rows
    ]


def test_names_of_metrics_lead_nowhere(tmp_path):
    names = [
        "../../../evil",
        "/etc/x",
        "..",
        "a/b",
        "a-b",
        "A-B",
        "long" * 100,
        "\udc00",
        "é\n\x0b",
    ]
    folder = tmp_path / "deep" / "run"
    write_lines(folder / "metrics.jsonl", [{"step": s, **dict.fromkeys(names, s)} for s in (1, 2)])
    text, _ = report(folder)
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    inside = {path for path in found if path.parent == Path("deep/run/plots")}
    assert found - inside == {Path("deep/run/metrics.jsonl"), Path("deep/run/report.html")}
    assert len(inside) == 3 * len(names) == 3 * len(figures(text))
    assert len({str(path).lower() for path in inside}) == len(inside)
    for path in inside:
        if path.suffix == ".svg":
            ElementTree.fromstring((tmp_path / path).read_text())


def test_evaluations_of_a_run(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(55.0, 65.0))
    text, page = report(folder)
    assert "65.0 [60.0, 70.0]" in page.text
    assert "63.0" in page.text
    assert "online_dpo, 40 steps, 1 min 30 s" in page.text
    assert "judge: kind reward_model, path runs/judge; baseline: start" in page.text
    # KL between the two steps it was logged at; nothing beyond them
    assert "2.00" in page.text
    assert "3.00 (at step 30)" in page.text
    names = {path.stem for path in (folder / "plots").iterdir()}
    assert {"win-rate", "win-rate-over-rounds", "win-rate-against-kl", "length"} <= names
    over = (folder / "plots" / "win-rate-over-rounds.csv").read_text().splitlines()
    assert over[1:] == ["run,round 1,1,55.0,50.0,60.0", "run,round 2,2,65.0,60.0,70.0"]
    against = (folder / "plots" / "win-rate-against-kl.csv").read_text().splitlines()
    assert against[1:] == ["run,round 1,2.0,55.0,50.0,60.0"]
    assert len(figures(text)) == len(names)


def test_an_alarm_is_told_and_marks_its_evaluation(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(65.0, 60.0, 55.0))
    _, page = report(folder)
    assert "alarm" not in page.text
    for index in (2, 3):
        path = folder / "evaluations" / f"{index:04d}" / "result.json"
        said = {"alarm": f"over-optimisation {index} {HOSTILE}", "training_win_rate": 90.0 + index}
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    text, page = report(folder)
    assert f"run: over-optimisation 2 {HOSTILE}." in page.text
    assert "over-optimisation 3" not in page.text
    assert HOSTILE not in text
    assert "round 2 (alarm)" in page.text
    assert "by the judge of training, %" in page.text
    assert "92.0" in page.text


def test_answers_of_an_evaluation_stand_beside_the_baselines(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(60.0,), answers=(HOSTILE,))
    text, page = report(folder)
    assert HOSTILE not in text
    assert HOSTILE in page.text
    assert "user: question 11" in page.text
    assert text.count('class="outcome win"') == 4
    assert text.count('class="outcome loss"') == 4
    assert text.count('class="outcome tie"') == 4
    assert 'data-preferences="0.2"' in text
    assert text.index("</span>baseline") < text.index("</span>run</th>")
    # "so it is" has 8 characters; 29 and eleven times 18 are 227 / 12 = 18.9 on average
    assert "+136 %" in page.text


def test_sample_of_any_kind_is_a_name(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(60.0,))
    path = folder / "evaluations" / "0001" / "answers.jsonl"
    path.write_text(path.read_text() + '{"prompt": "p", "sample": [1], "completion": "odd one"}\n')
    _, page = report(folder)
    assert "odd one" in page.text


def test_runs_with_the_same_baseline_share_its_column(tmp_path):
    evaluated(tmp_path / "one", rates=(60.0,))
    evaluated(tmp_path / "two", rates=(62.0,))
    text, page = report(tmp_path)
    assert text.count("</span>baseline") == 1
    assert "not comparable" not in page.text
    assert text.count('data-preferences="0.9,0.9"') == 4
    assert (tmp_path / "plots" / "win-rate-against-time.csv").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"judge": "another"}, "judges differ"),
        ({"prompts": 15}, "prompts differ: one / two"),
        ({"baseline": "other words"}, "answers of the baselines differ: one / two"),
    ],
)
def test_differences_of_evaluations_are_told(tmp_path, change, sentence):
    evaluated(tmp_path / "one", rates=(60.0,))
    evaluated(tmp_path / "two", rates=(62.0,), **change)
    runs = read_runs(tmp_path, [])
    (told,) = differences(runs, {name: read_evaluations(run, []) for name, run in runs.items()})
    assert "Win rates are not comparable" in told
    assert sentence in told


def test_win_rates_that_mean_different_things_are_not_drawn_together(tmp_path):
    evaluated(tmp_path / "one", rates=(60.0,))
    evaluated(tmp_path / "two", rates=(62.0,), judge="another")
    _, page = report(tmp_path)
    assert "Win rates are not comparable" in page.text
    assert not list((tmp_path / "plots").glob("win-rate*"))


def test_evaluation_half_written_is_named_and_the_rest_is_shown(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(55.0, 65.0))
    (folder / "evaluations" / "0002" / "result.json").write_text('{"win_r')
    _, page = report(folder)
    assert "0002/result.json: not a JSON object; left out." in page.text
    assert "55.0 [50.0, 60.0]" in page.text


def test_evaluations_of_the_summary_are_shown_where_their_folder_is_gone(tmp_path):
    folder = evaluated(tmp_path / "run", rates=(55.0, 65.0))
    shutil.rmtree(folder / "evaluations")
    _, page = report(folder)
    assert "65.0 [60.0, 70.0]" in page.text
    assert "Samples" not in page.headings


def test_lengths_before_and_after(tmp_path):
    answers = [{"sft": "x" * n, "dpo": "x" * 2 * n} for n in range(1, 21)]
    write_lines(tmp_path / "samples.jsonl", [{"prompt": "p", "answers": a} for a in answers])
    _, page = report(tmp_path)
    # of 1 to 20: mean and median 10.5, 10 % at 2.9 and 90 % at 18.1; twice that is 100 % more
    assert "+100 %" in page.text
    with (tmp_path / "plots" / "length.csv").open() as file:
        rows = list(csv.DictReader(file))
    for kind in ("answers", "baseline"):
        assert sum(int(row["answers"]) for row in rows if row["answers_of"] == kind) == 20
    assert {row["run"] for row in rows} == {"dpo"}


def test_rounds_have_a_table(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    rounds = [{"round": k, "pairs": 500 + k} for k in range(3)]
    (tmp_path / "summary.json").write_text(json.dumps({"algorithm": "inpo", "rounds": rounds}))
    _, page = report(tmp_path)
    assert "Rounds of" in page.text
    assert "502" in page.text


def test_judge_of_a_run_in_a_folder_of_runs_is_shown(tmp_path):
    write_lines(tmp_path / "rm" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    found = {"algorithm": "reward_model", "reward_model": summary()["reward_model"]}
    (tmp_path / "rm" / "summary.json").write_text(json.dumps(found))
    text, page = report(tmp_path)
    assert "0.780" in page.text
    assert len(figures(text)) == 1


def test_logged_win_rates_are_drawn_once(tmp_path):
    rows = [{"step": s, "loss": 1.0, "evaluation/win_rate": 50.0 + s} for s in (1, 2)]
    write_lines(tmp_path / "alone" / "metrics.jsonl", rows)
    report(tmp_path / "alone")
    assert (tmp_path / "alone" / "plots" / "curve-evaluation-win_rate.png").exists()
    folder = evaluated(tmp_path / "run", rates=(51.0, 52.0))
    write_lines(folder / "metrics.jsonl", rows)
    report(folder)
    assert not list((folder / "plots").glob("curve-evaluation*"))
    assert (folder / "plots" / "win-rate-over-rounds.png").exists()
