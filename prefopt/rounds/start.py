"""``start.json``: what all that lies in a folder depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from prefopt.errors import PrefoptError
from prefopt.rounds.facts import FORMAT, differences, listed, read_facts
from prefopt.rounds.sums import damaged, expected_sum, set_aside, write_summed


def open_facts(path: Path, facts: Mapping[str, Any], made: str) -> None:
    """Writes down facts, or compares them with those that are there; one process calls this.

    What an older version did not write down is taken to be as it is now.

    Args:
        path: The file.
        facts: Plain values.
        made: What depends on them, in words.

    Raises:
        PrefoptError: They differ, the file is damaged, or a newer version has written it.
    """
    content = json.dumps({"format": FORMAT, **facts}, indent=2) + "\n"
    damages = damaged([path])
    if not path.exists() and any(p.is_dir() for p in path.parent.glob("*")):
        damages = {path: f"{path}: gone"}
    # the sum says what was in it
    if damages and expected_sum(path) != xxhash.xxh3_128_hexdigest(content.encode()):
        raise PrefoptError(
            f"{damages[path]}, and other {made} than these may lie beside it; restore the "
            "file, or delete the run folder to begin again"
        )
    if path.exists():
        set_aside(damages)
    if not path.exists():
        write_summed(path, content)
        return
    found = read_facts(path, "restore the file, or delete the run folder to begin again")
    plain = json.loads(content)
    changes = differences({key: found.get(key, plain[key]) for key in facts}, plain)
    different = {key: change for key, change in changes if key != "format"}
    if different:
        raise PrefoptError(
            f"{path.parent}: these {made} were begun with other {listed(different)}; restore what "
            "was there, choose another folder, or delete this one to begin again"
        )
