"""What each parser and each builder is fuzzed with, and what must hold for every input."""
