"""What ``prefopt game`` does: files and options in, distances from equilibrium out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.errors import PrefoptError
from prefopt.games.game import Game
from prefopt.games.trajectory import ALGORITHMS, Trajectory, algorithm_name, play

DEFAULT_BETA = 0.1
SHOWN_ACTIONS = 10
PICTURES = (".png", ".svg", ".pdf")


def play_files(
    payoff: str,
    reference: str | None,
    algorithms: Sequence[str],
    *,
    beta: float | None,
    steps: int,
    settings: dict[str, float],
    plot: str | None,
) -> dict[str, Any]:
    """Plays each algorithm from the reference.

    Args:
        payoff: JSON file with the matrix P, a list of rows.
        reference: JSON file with the list mu; uniform if None.
        algorithms: Names or aliases; at least one.
        beta: The game's regularisation; 0.1 if None.
        steps: Steps of each algorithm.
        settings: The algorithm's own, over its defaults; with a single algorithm only. INPO's
            ``tau`` is another name of beta.
        plot: Picture to write, if any: .png, .svg or .pdf.

    Returns:
        ``policy``, ``kl_to_equilibrium``, ``exploitability`` and ``queries``; a mapping from name
        to these where there are several algorithms.

    Raises:
        PrefoptError: If a file, an option or a value is refused.
    """
    beta, settings = _beta_and_settings(algorithms, beta, settings)
    if plot:
        _check_picture(Path(plot))
    matrix = _read_payoff(payoff)
    uniform = [1 / max(len(matrix), 1)] * len(matrix)
    game = Game(matrix, uniform if reference is None else _read_reference(reference), beta)
    runs = {name: play(game, name, steps, **settings) for name in algorithms}
    if plot:
        # matplotlib takes half a second to import
        from prefopt.games.plot import plot_trajectories

        actions = len(game.reference)
        title = f"{actions} action{'s' if actions > 1 else ''}, beta = {game.beta:g}"
        plot_trajectories({_label(name): run for name, run in runs.items()}, plot, title)
    results = {name: _result(run) for name, run in runs.items()}
    return results if len(results) > 1 else results[algorithms[0]]


def print_result(result: dict[str, Any], algorithms: Sequence[str]) -> None:
    """A table of distances, and the most probable actions of each policy."""
    results = result if len(algorithms) > 1 else {algorithms[0]: result}
    width = max(len("algorithm"), *map(len, map(_label, results)))
    print(f"{'algorithm':{width}}  {'queries':>7}  {'KL':>9}  {'exploitability':>14}  policy")
    for name, row in results.items():
        policy = np.array(row["policy"])
        top = np.argsort(-policy, kind="stable")[:SHOWN_ACTIONS]
        actions = ", ".join(f"{index}: {policy[index]:.4f}" for index in top)
        more = f", {len(policy) - len(top)} more" if len(policy) > len(top) else ""
        print(
            f"{_label(name):{width}}  {row['queries']:>7}  {row['kl_to_equilibrium']:>9.2e}  "
            f"{row['exploitability']:>14.2e}  {actions}{more}"
        )


def _beta_and_settings(
    algorithms: Sequence[str], beta: float | None, settings: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """The game's beta, with INPO's tau folded in, and the other settings."""
    names = [algorithm_name(name) for name in algorithms]
    if settings and len(names) > 1:
        raise PrefoptError(
            f"{', '.join(settings)}: expected with a single algorithm, found "
            f"{', '.join(algorithms)}; eta means something else in each, so they run on defaults"
        )
    tau = settings.get("tau")
    if tau is not None and names == ["inpo"]:
        settings = {name: value for name, value in settings.items() if name != "tau"}
        if beta not in (None, tau):
            raise PrefoptError(f"tau: found {tau:g} beside beta {beta:g}; INPO's tau is beta")
        beta = tau
    return DEFAULT_BETA if beta is None else beta, settings


def _label(name: str) -> str:
    """The name, with a remark where distances are measured from another equilibrium."""
    return name if ALGORITHMS[algorithm_name(name)].regularised else f"{name} (from Nash)"


def _result(run: Trajectory) -> dict[str, Any]:
    return {
        "policy": np.exp(run.log_policy).tolist(),
        "kl_to_equilibrium": float(run.kl[-1]),
        "exploitability": float(run.exploitability[-1]),
        "queries": int(run.queries[-1]),
    }


def _check_picture(path: Path) -> None:
    """Refuses, before anything is played, a picture that could not be written after it."""
    if path.suffix.lower() not in PICTURES:
        raise PrefoptError(
            f"plot: found {str(path)!r}, expected a name that ends in {', '.join(PICTURES)}"
        )
    if not path.parent.is_dir():
        raise PrefoptError(
            f"plot: found no folder {str(path.parent)!r} to write {path.name!r} to; create it"
        )


def _read_payoff(path: str) -> list[list[float]]:
    rows = _read_list(path, "payoff")
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            raise PrefoptError(
                f"payoff[{index}]: found {_shown(row)}, expected the payoff as a list of rows, "
                "[[0.5, 0.9], ...]"
            )
        if len(row) != len(rows[0]):
            raise PrefoptError(
                f"payoff[{index}]: found a row of {len(row)} entries, expected {len(rows[0])}, as "
                "in row 0"
            )
        _check_numbers(f"payoff[{index}]", row)
    return rows


def _read_reference(path: str) -> list[float]:
    numbers = _read_list(path, "reference")
    _check_numbers("reference", numbers)
    return numbers


def _read_list(path: str, name: str) -> list[Any]:
    """The JSON list in a file; every number in it is a float."""
    try:
        values = json.loads(Path(path).read_bytes(), parse_int=float)
    except RecursionError as error:
        raise PrefoptError(f"{path}: lists nested too deeply, expected the {name}") from error
    except ValueError as error:
        raise PrefoptError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise PrefoptError(f"{name}: found {_shown(values)}, expected a list (in {path})")
    return values


def _check_numbers(place: str, values: list[Any]) -> None:
    for index, item in enumerate(values):
        if not isinstance(item, float):
            raise PrefoptError(f"{place}[{index}]: found {_shown(item)}, expected a number")


def _shown(item: Any) -> str:
    """A JSON value in a message: lists and objects, which may be of any size, by their kind."""
    if isinstance(item, list | dict):
        return "a list" if isinstance(item, list) else "an object"
    return json.dumps(item)
