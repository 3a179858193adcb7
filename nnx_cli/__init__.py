"""Train a small language model from scratch on your own text, on the computer you already have."""

__version__ = "0.1.0"
