"""The web page of a model, which is the same whoever computes the tokens."""
