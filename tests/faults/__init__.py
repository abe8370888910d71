"""Faults injected into real ``prefopt train`` processes, and a count of what was lost."""
