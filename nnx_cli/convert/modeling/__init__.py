"""The source of an architecture as one file for transformers."""
