"""A run folder: its files, checkpoints and logs, and how a MODEL is found and loaded."""
