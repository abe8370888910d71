"""The recipe parser: files of any bytes, changed recipes, overrides, and the resolved copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from fuzz.target import Target, attempt, edited, file_of, plain, scratch, texts
from prefopt.recipe import Recipe, load_recipe
from prefopt.train import known_keys

KNOWN = known_keys()
SHIPPED = [
    path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    if path.parent.name != "accelerate"
]
WHOLE = [yaml.safe_load(text) for text in SHIPPED]
# What every recipe needs and one section as shipped: PyYAML reads a whole one in ten milliseconds.
SMALL = b"model: {path: a}\ndata: {path: b}\ntrainer: {algorithm: dpo}\n"
DOCUMENTS = [
    yaml.safe_load(SMALL) | {section: document[section]}
    for document in WHOLE
    for section in document
]
SHORT = [text.encode() for text in SHIPPED if len(text) < 500]
# the characters and words of YAML's grammar, and known weak spots of PyYAML
PIECES = [
    *(character.encode() for character in "{}[]:,-?&*!|>'\"%@`#\n\t .~=_\x00\x85\u2028\ufeff"),
    *(b": ", b"\n  ", b"- ", b"<<", b"&a ", b"*a", b"!!int ", b"!!binary ", b"!x ", b"---\n"),
    *(b"...\n", b"%YAML 1.1\n", b"%TAG ! x\n", b"0x", b"1e5", b"no", b"true", b"2020-01-01"),
    *(b'"\\UFFFFFFFF"', b'"\\ud800"', b"\\x", b"\xff", b"[" * 200, b"9" * 5000, b"1e400", b"null"),
]
KEYS = sorted(
    {
        f"{section}.{key}" if isinstance(keys, dict) else section
        for document in WHOLE
        for section, keys in document.items()
        for key in (keys if isinstance(keys, dict) else [""])
    }
    | {"model.lora", "model.lora.r", "data.sources", "eval.judge", "guards", "guards.max_kl"}
    | {"rollout.mix", "rollout.servers", "trainer.x.y", "x", "", "seed.x", "run_dir"}
)
values = plain | st.sampled_from([{}, [], [{}], "dpo", "all-linear", 0, 1, 0.5, 10**4299])


def read_bytes(content: bytes) -> None:
    """A file of any bytes is a recipe or is refused."""
    recipe = attempt(load_recipe, file_of("recipe.yaml", content), (), KNOWN)
    if isinstance(recipe, Recipe):
        check_resolved(recipe)


def read_changed(case: tuple[dict[str, Any], list[tuple[str, Any]], list[str]]) -> None:
    """So is a recipe with other values in it, and overrides of any text."""
    document, changes, overrides = case
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in document.items()}
    for key, value in changes:
        section, _, name = key.partition(".")
        if name and isinstance(changed.get(section), dict):
            changed[section][name] = value
        else:
            changed[section] = value
    content = yaml.safe_dump(changed, allow_unicode=False).encode()
    recipe = attempt(load_recipe, file_of("recipe.yaml", content), overrides, KNOWN)
    if isinstance(recipe, Recipe):
        check_resolved(recipe)


def check_resolved(recipe: Recipe) -> None:
    """The copy that a run keeps reads back as the same recipe, and resolves to itself."""
    path = scratch() / "resolved.yaml"
    recipe.write_resolved(path)
    again = load_recipe(path, known=KNOWN)
    assert again == recipe
    assert again.resolved() == recipe.resolved()


written = st.sampled_from([p.decode(errors="ignore") for p in PIECES]) | texts | plain.map(str)
overrides = st.builds("{}={}".format, st.sampled_from(KEYS), written) | texts

RECIPES = Target(
    st.tuples(
        st.sampled_from(DOCUMENTS),
        st.lists(st.tuples(st.sampled_from(KEYS) | texts, values), max_size=3),
        st.lists(overrides, max_size=2),
    ),
    read_changed,
)
RECIPE_FILES = Target(
    edited(st.sampled_from([SMALL, SMALL, *SHORT]), PIECES),
    read_bytes,
    raw=True,
)
