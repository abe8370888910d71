"""Evaluation: win rates and calibration with their uncertainty, and the report of a run."""
