"""Numbers of runs and races as pages that open anywhere: one file each, without a script and without a request."""
