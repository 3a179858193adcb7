"""A tracker in a process of its own that fails where a test wants it to: `start = fake.at("scalars", "raise")`."""

import json
import os
import time
from pathlib import Path

CALLS = "start", "scalars", "sample", "figures", "rewind", "finish"


def fail(how):
    if how == "raise":
        raise RuntimeError("no such server\nmore")
    if how == "exit":
        os._exit(3)
    while how == "spin":
        pass
    while how == "sleep":
        time.sleep(60)


def at(where, how):
    """The `start` of a tracker that fails in one call."""

    class Fake:
        place = "http://nowhere"

        def __init__(self, run):
            self.run = run

        def __getattr__(self, name):
            if name not in CALLS:
                raise AttributeError(name)

            def call(*values):
                if name == where:
                    fail(how)
                with open(Path(os.environ["CALLS"]) / f"{where}-{how}.jsonl", "a") as file:
                    file.write(json.dumps([name, *values]) + "\n")

            return call

    def start(run):
        fake = Fake(run)
        fake.start(run.id, dict(run.settings))
        return fake

    return start
