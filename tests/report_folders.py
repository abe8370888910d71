"""Made-up run folders, and the page of their report as a browser would see it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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


def report(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def figures(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)


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


def collection(folder: Path) -> Path:
    """A folder of three runs with what a quickstart writes of them."""
    for name in ("sft", "dpo", "reward_model"):
        write_lines(folder / name / "metrics.jsonl", training())
        (folder / name / "recipe.yaml").write_text(f"trainer:\n  algorithm: {name}\n")
        (folder / name / "environment.json").write_text('{"torch": "2.13.0"}')
    (folder / "summary.json").write_text(json.dumps(summary()))
    answers = {"sft": "An apple.", "dpo": f"Two pears. {HOSTILE}"}
    write_lines(folder / "samples.jsonl", [{"prompt": f"Fruit & <b>{HOSTILE}", "answers": answers}])
    return folder


def evaluated(
    folder: Path,
    *,
    rates: tuple[float, ...] = (55.0, 65.0),
    judge: str = "runs/judge",
    prompts: int = 12,
    answers: tuple[str, ...] = (),
    baseline: str = "so it is",
) -> Path:
    """A run of several rounds with an evaluation after each; KL was logged at steps 10 and 30.

    Evaluation n was at step 20 n. Of every three prompts the run won, lost and tied one, and its
    answers are `answers` as far as they go.
    """
    steps = [
        {"step": step, "loss": 1 / step, "round": step // 21, **more}
        for step, more in ((1, {}), (10, {"kl": 1.0}), (30, {"kl": 3.0}), (40, {}))
    ]
    write_lines(folder / "metrics.jsonl", steps)

    def lines(texts: list[str]) -> list[dict[str, Any]]:
        return [
            {"prompt": [{"role": "user", "content": f"question {n}"}], "sample": 0, "completion": t}
            for n, t in enumerate(texts)
        ]

    inside = folder / "evaluations"
    write_lines(inside / "baseline.jsonl", lines([baseline] * prompts))
    own = [*answers, *("much longer answer" for _ in range(prompts))][:prompts]
    results = []
    for index, rate in enumerate(rates, 1):
        write_lines(inside / f"{index:04d}" / "answers.jsonl", lines(own))
        preferences = [{"prompt": n, "preference": (0.9, 0.2, 0.5)[n % 3]} for n in range(prompts)]
        write_lines(inside / f"{index:04d}" / "preferences.jsonl", preferences)
        result = {
            "after": index,
            "unit": "round",
            "step": 20 * index,
            "win_rate": rate,
            "win_rate_ci": [rate - 5, rate + 5],
            "wins": prompts // 3,
            "ties": prompts // 3,
            "losses": prompts // 3,
            "prompts": prompts,
            "mean_length": sum(map(len, own)) / prompts,
            "baseline_mean_length": float(len(baseline)),
            "length_controlled": {"win_rate": rate - 2, "standard_error": 1.0},
            "judge": {"kind": "reward_model", "path": judge},
            "baseline": "start",
        }
        (inside / f"{index:04d}" / "result.json").write_text(json.dumps(result))
        results.append(result)
    found = {"algorithm": "online_dpo", "steps": 40, "seconds": 90.0, "evaluations": results}
    (folder / "summary.json").write_text(json.dumps(found))
    return folder
