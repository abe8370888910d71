"""prefopt: fine-tune chat models on preferences, offline and online."""

__version__ = "0.1.0"
