"""A model in a format of others: one file a format, found by its name."""
