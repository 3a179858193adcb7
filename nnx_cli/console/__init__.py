"""What people see: the product on stdout, progress and notes on stderr; the only place that imports rich."""
