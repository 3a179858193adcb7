"""Where else the numbers of a run are shown: one file a tracker, each in a process of its own."""
