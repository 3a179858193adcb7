"""What architectures of their own do inside with a text, beside attention that all record alike."""
