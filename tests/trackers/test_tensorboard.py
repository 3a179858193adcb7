import io
import os
import socket

import pytest


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
