"""From logits to the next token to text."""
