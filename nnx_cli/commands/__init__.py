"""What each verb of `nnx` does: one file a command, from options to config to one call to what is shown."""
