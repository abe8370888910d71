"""Prompts for judges behind an API, made of the templates in ``templates/``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.progress import Progress

from prefopt.reward_models.chat_api import ChatAnswer, ChatAPI, ChatRequest
from prefopt.rounds.storage import digest

FOLDER = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Fills a template.

    It is given ``boundary`` as well, a word made of a hash of all values, with which it marks where
    the texts to judge begin and end: a text cannot hold its own, and so cannot feign its end.

    Args:
        template: The name of a file in ``templates/``, without its suffix.
        **values: What the template asks for.
    """
    boundary = digest(values)[:12]
    filled = _environment().get_template(f"{template}.jinja").render(boundary=boundary, **values)
    return filled.strip()


def template_hash(template: str) -> str:
    """The sha256 of a template's text, in hexadecimal digits."""
    return sha256((FOLDER / f"{template}.jinja").read_bytes()).hexdigest()


def describe_judge(api: ChatAPI, template: str, max_tokens: int) -> dict[str, Any]:
    """All that the judge's answers depend on besides what it is shown."""
    return {
        **api.describe(),
        "template": template,
        "template_hash": template_hash(template),
        "temperature": 0.0,
        "max_tokens": max_tokens,
    }


def ask(api: ChatAPI, prompts: Sequence[str], max_tokens: int) -> list[ChatAnswer]:
    """The judge's answers, drawn greedily, under a progress bar on stderr.

    Raises:
        PrefoptError: The API refuses, or fails for good; what it has answered is kept.
    """
    requests = [
        ChatRequest([{"role": "user", "content": prompt}], max_tokens=max_tokens)
        for prompt in prompts
    ]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("judge", total=len(requests))
        return api.ask(requests, done=lambda index, answer: bar.advance(task))


def readable(answer: ChatAnswer) -> str:
    """The text in which a verdict is looked for; none in one that was cut off."""
    return "" if answer.finish_reason == "length" else answer.text


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        autoescape=False,  # plain text, no page
        trim_blocks=True,
        lstrip_blocks=True,
    )
