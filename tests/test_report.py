"""The report of made-up run folders: complete, self-contained, and safe to open."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefopt.errors import PrefoptError
from prefopt.eval.plots import COLOURS, style_of
from prefopt.eval.report import write_report

HOSTILE = "<script>alert('boo')</script>"


class Page(HTMLParser):
    """Collects what a browser would see: tags, what they load, headings and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] in ("h1", "h2", "h3") and data.strip():
            self.headings.append(data.strip())


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training(steps: int = 8) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / steps,
            "loss": 0.7 - 0.01 * step,
            "rewards/chosen": -0.1 * step,
            "rewards/rejected": -0.3 * step,
            "logps/chosen": -30.0 - step,
            "logps/rejected": -31.0 - 2 * step,
            "kl": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]


def summary() -> dict:
    return {
        "seed": 3,
        "algorithms": {
            "sft": {"win_rate": 50.0, "kl": 0.0, "mean_length": 12.0, "seconds": 9.0},
            "dpo": {
                "win_rate": 63.1,
                "win_rate_ci": [58.9, 67.2],
                "kl": 4.2,
                "mean_length": 12.3,
                "seconds": 125.0,
            },
        },
        "reward_model": {
            "accuracy": 0.78,
            "ece": 0.04,
            "calibration": [
                {"confidence": 0.55, "accuracy": 0.6, "count": 40},
                {"confidence": 0.95, "accuracy": 0.9, "count": 60},
            ],
            "accuracy_by_length": [{"group": "short", "accuracy": 0.8, "count": 55}],
        },
    }


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    for name in ("sft", "dpo", "reward_model"):
        write_lines(folder / name / "metrics.jsonl", training())
        (folder / name / "recipe.yaml").write_text(f"trainer:\n  algorithm: {name}\n")
        (folder / name / "environment.json").write_text('{"torch": "2.13.0"}')
    (folder / "summary.json").write_text(json.dumps(summary()))
    answers = {"sft": "An apple.", "dpo": f"Two pears. {HOSTILE}"}
    write_lines(folder / "samples.jsonl", [{"prompt": f"Fruit & <b>{HOSTILE}", "answers": answers}])
    return folder


def report(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def figures(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)


def test_collection_shows_every_part(quickstart):
    text, page = report(quickstart)
    assert page.headings[0] == "quickstart"
    for heading in ("Algorithms", "Judge:", "Training", "logps", "Samples"):
        assert heading in page.headings
    for shown in ("seed 3", "63.1 [58.9, 67.2]", "2 min 05 s", "0.780", "short", "torch"):
        assert shown in page.text
    assert "algorithm: dpo" in page.text
    # Bars, frontier, calibration; three runs of loss, rewards, logps; kl laid over each other.
    assert len(figures(text)) == 3 + 3 * 3 + 1


def test_plots_are_well_formed_and_take_the_pages_ink(quickstart):
    text, _ = report(quickstart)
    for svg in figures(text):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert "#000000" not in svg
        assert "#010203" not in svg


def test_hostile_answers_stay_text(quickstart):
    text, page = report(quickstart)
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


def test_page_loads_nothing(quickstart):
    text, page = report(quickstart)
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert "default-src 'none'" in text


def test_long_files_and_samples_stay_under_three_megabytes(tmp_path):
    for run in range(9):
        write_lines(tmp_path / f"run{run}" / "metrics.jsonl", training())
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
    write_lines(tmp_path / "metrics.jsonl", training())
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


def test_new_algorithm_needs_no_code(quickstart):
    found = summary()
    found["algorithms"]["my_new_method"] = {"win_rate": 71.0, "kl": 2.5, "regret": 0.125}
    (quickstart / "summary.json").write_text(json.dumps(found))
    text, page = report(quickstart)
    bars, frontier = figures(text)[:2]
    assert "my_new_method" in bars
    assert "my_new_method" in frontier
    assert "regret" in page.text
    assert "0.125" in page.text


def test_algorithm_keeps_its_colour_everywhere(quickstart):
    text, _ = report(quickstart)
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


def test_same_folder_gives_the_same_page_and_leaves_nothing_aside(quickstart):
    first, _ = report(quickstart)
    assert report(quickstart)[0] == first
    assert not list(quickstart.glob(".*"))


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
