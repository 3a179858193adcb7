"""One run of training: the loop and what belongs to it."""
