"""Parts that models are built from, and how blocks run."""
