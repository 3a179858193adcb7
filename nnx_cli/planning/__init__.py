"""What a run needs and costs, and every value that was left on auto."""
