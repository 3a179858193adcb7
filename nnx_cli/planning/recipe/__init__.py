"""What is chosen for the user, from text and time: size, tokenizer and how to train; its numbers are in `table`."""
