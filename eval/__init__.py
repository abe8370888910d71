"""Evaluation: win rates and calibration with their uncertainty, and the report of a run."""

from prefopt.eval.length_control import length_controlled_win_rate

__all__ = ["length_controlled_win_rate"]
