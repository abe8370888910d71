"""The generated world: chat tasks with known right answers, a tokenizer and an untrained model."""

from prefopt.world.build import WorldPaths, build_world
from prefopt.world.gold import STYLES, gold_preference, gold_quality, ideal_answer

__all__ = [
    "STYLES",
    "WorldPaths",
    "build_world",
    "gold_preference",
    "gold_quality",
    "ideal_answer",
]
