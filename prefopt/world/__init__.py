"""The generated world: chat tasks with known right answers, a tokenizer and an untrained model."""

from prefopt.world.build import WorldPaths, build_world
from prefopt.world.gold import gold_preference, gold_quality

__all__ = ["WorldPaths", "build_world", "gold_preference", "gold_quality"]
