"""Generation: token ids in, token ids out, behind one ``Engine`` protocol."""

from prefopt.rollout.engine import Completion, Engine, SamplingSettings

__all__ = ["Completion", "Engine", "SamplingSettings"]
