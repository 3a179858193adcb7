import io
import itertools
import os
import socket

import pytest

from nnx_cli.trackers import tensorboard
from nnx_cli.trackers._tracker import TrackedRun


@pytest.fixture
def events(twice):
    from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE as ALL
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(twice / "tensorboard"), size_guidance=ALL).Reload()


def test_its_own_reader_finds_every_number(events, records):
    for name, tag in (("train_loss", "train/loss"), ("val_loss", "eval/loss"), ("lr", "train/learning_rate")):
        written = [(e.step, e.value) for e in events.Scalars(tag)]
        logged = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if r[name] is not None]
        assert written == logged, tag
    assert records[-1]["step"] == 12 and events.Scalars("train/global_step")[-1].value == 12


def test_samples_and_settings_are_text(events, twice):
    samples = events.Tensors("samples")
    assert [event.step for event in samples] == [4, 8, 12]
    metadata = events.SummaryMetadata("samples")
    assert metadata.plugin_data.plugin_name == "text"
    settings = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "| dim | 32 |" in settings and "| optimizer | " in settings and "path" not in settings


def test_figures_are_pictures(events):
    from PIL import Image

    tags = events.Tags()["images"]
    assert {"figures/Loss", "figures/Learning rate", "figures/Gradient norm"} <= set(tags)
    drawn = events.Images("figures/Loss")
    assert [event.step for event in drawn] == [8, 12]
    image = Image.open(io.BytesIO(drawn[-1].encoded_image_string))
    assert image.format == "PNG" and image.size == (drawn[-1].width, drawn[-1].height)


def test_nothing_private_is_in_it(twice, leaks):
    assert len(list((twice / "tensorboard").iterdir())) == 2
    assert not leaks(twice / "tensorboard", twice.parent, "/a/path")
    assert socket.gethostname() not in "".join(os.listdir(twice / "tensorboard"))


def test_a_run_that_is_told_anew_is_there_once(run, monkeypatch):
    """The folder has event files, and nothing that says what they are told of: trackers/ is gone."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seconds = itertools.count(1_000_000_000)  # by which files have their names, and their order
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(seconds))
    for begin in (0, 0, 2, 40):  # steps after which it is told, as `follow` does
        tracker = tensorboard.start(TrackedRun("a", run.folder, "id", {"dim": 32}))
        tracker.rewind(begin)
        for step in range(begin + 1, 5):
            tracker.scalars(step, {"train/loss": step / 2})
        tracker.finish(0)
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(n, n / 2) for n in range(1, 5)]
    assert "config" in events.Tags()["tensors"]
