"""The report in headless Chromium: only its own script is run, and all of it is shown."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_folders import evaluated, write_lines

from prefopt.eval.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "\" onmouseover='window.pwned = 1' x=\"",
    "</div></td></table><svg onload=window.pwned=1>",
    "]]> --> <!-- <style>* { display: none }</style>",
    "no-space-" * 200,
    "<a href='javascript:window.pwned=1'>{{ 7 * 7 }} ${7 * 7}</a>",
)
# wins are the first of every three rows, losses the second, ties the third
WINS, LOSSES, TIES = (HOSTILE[k::3] for k in range(3))
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run <b>&\"'"
    return write_report(evaluated(folder, answers=HOSTILE, baseline=HOSTILE[0]))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for name in ("one", "two_with_a_name_of_no_spaces_" + 8 * "and_long_as_it_is_"):
        evaluated(folder / name, answers=HOSTILE)
    return write_report(folder)


@pytest.fixture
def look(browser: Any) -> Iterator[Open]:
    """Opens a page, and fails afterwards on any message, error or request but for the page."""
    seen: list[str] = []
    contexts = []

    def opened(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.on("request", lambda request: seen.append(request.url) if request.url != url else None)
        url = path.as_uri()
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []


def visible(page: Any) -> list[str]:
    """The answers of the run in the rows that are shown, in their order."""
    rows = page.locator("#samples tr:visible td:last-child .text")
    return [text.strip() for text in rows.all_text_contents()]


def test_hostile_answers_are_shown_and_not_run(look, single):
    page = look(single)
    assert visible(page)[: len(HOSTILE)] == [text.strip() for text in HOSTILE]
    page.locator("#samples td").last.hover()
    assert page.evaluate("window.pwned") is None
    assert page.locator("#samples script, #samples img, #samples svg, #samples a").count() == 0
    assert page.locator("h1").inner_text() == single.parent.name


def test_a_script_that_got_in_would_not_run(browser, single, tmp_path):
    text = single.read_text(encoding="utf-8")
    changed = text.replace("</h1>", "</h1><script>window.pwned = 1</script>", 1)
    (tmp_path / "page.html").write_text(changed, encoding="utf-8")
    page = browser.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("window.pwned") is None
    assert "Content Security Policy" in messages[0]
    page.locator("#filter").fill("onerror")  # its own script does
    assert visible(page) == [HOSTILE[2]]
    page.close()


def test_text_filter_shows_rows_that_contain_it(look, single):
    page = look(single)
    assert page.locator("#shown").inner_text() == "12"
    page.locator("#filter").fill("ONERROR")
    assert visible(page) == [HOSTILE[2]]
    assert page.locator("#shown").inner_text() == "1"
    page.locator("#filter").fill("question 1")  # and 10 and 11
    assert len(visible(page)) == 3
    page.locator("#filter").fill("win 0.900")  # what the page says about answers is not searched
    assert visible(page) == []
    page.locator("#filter").fill("")
    assert len(visible(page)) == 12


def test_outcome_filter_and_order(look, single):
    page = look(single)
    for outcome, texts in (("win", WINS), ("loss", LOSSES), ("tie", TIES)):
        page.locator("#outcome").select_option(outcome)
        assert visible(page)[: len(texts)] == [text.strip() for text in texts]
        assert len(visible(page)) == 4
    page.locator("#outcome").select_option("all")
    page.locator("#order").select_option("low")
    assert visible(page)[:3] == [text.strip() for text in LOSSES]
    page.locator("#order").select_option("high")
    assert visible(page)[:3] == [text.strip() for text in WINS]
    page.locator("#order").select_option("given")
    assert visible(page)[:2] == [text.strip() for text in HOSTILE[:2]]


def test_filters_of_several_runs(look, several):
    page = look(several)
    assert page.locator("#judged option").all_text_contents()[0] == "of one"
    page.locator("#judged").select_option("1")
    page.locator("#outcome").select_option("win")
    assert page.locator("#shown").inner_text() == "4"


@pytest.mark.parametrize("name", ["single", "several"])
def test_phone_has_no_sideways_scrolling(look, name, request):
    page = look(
        request.getfixturevalue(name),
        viewport={"width": 360, "height": 740},
        device_scale_factor=2,
        is_mobile=True,
    )
    for details in page.locator("summary").all():
        details.click()
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert inner == 360
    assert width <= inner
    # however long a name is, a number stands beside it without scrolling
    number = page.locator("td.name + td").first.bounding_box()
    assert number["x"] + number["width"] <= 360
    # answers stand below each other, each under its name
    cells = page.locator("#samples tr").first.locator("td").all()
    boxes = [cell.bounding_box() for cell in cells]
    assert all(box["x"] + box["width"] <= 360 for box in boxes)
    assert all(a["y"] + a["height"] <= b["y"] + 1 for a, b in pairwise(boxes))


def test_right_to_left_text_begins_at_the_right(look, tmp_path):
    row = {"prompt": "שלום, עולם", "answers": {"dpo": "Hello"}}
    write_lines(tmp_path / "samples.jsonl", [row])
    page = look(write_report(tmp_path))
    parts = page.locator("#samples .text").all()
    directions = [part.evaluate("part => getComputedStyle(part).direction") for part in parts]
    assert directions == ["rtl", "ltr"]


def test_dark_mode_has_other_colours_for_page_text_and_plots(look, single):
    script = """[
        getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector("figure svg text")).fill,
    ]"""
    light = look(single, color_scheme="light").evaluate(script)
    dark = look(single, color_scheme="dark").evaluate(script)
    assert all(a != b for a, b in zip(light, dark, strict=True))

    def brightness(colour: str) -> int:
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert brightness(light[0]) > brightness(light[1])
    assert brightness(dark[0]) < brightness(dark[1])
    assert dark[2] == dark[1]
