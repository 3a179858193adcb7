"""Checkpoints of the architectures' original code: one file an architecture, found by its name."""
