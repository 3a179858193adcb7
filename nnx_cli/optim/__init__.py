"""Optimizers, one file each, found by their names."""
