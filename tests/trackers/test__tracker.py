"""What trackers are told of a run: numbers by their names there, settings without anything private."""

import math

from nnx_cli.trackers._tracker import sample_page, scalars_of, settings_of


def test_numbers_alone_are_told():
    record = {"step": 3, "val_loss": None, "lr": math.inf, "mfu": 0.5, "note": "x", "is_new": True, "later": 1}
    assert scalars_of(record, None) == {"train/global_step": 3.0, "train/mfu": 0.5, "train/later": 1.0}


def test_settings_are_flat_and_hold_no_path():
    config = {
        "model": {"name": "/home/ada/my.py", "file": "/home/ada/my.py", "sha256": "0", "size": None, "dim": 8},
        "training": {"lr": 0.1, "sample_prompt": "~/x", "device": "cpu", "log_to": ["wandb"], "report": True},
        "data": {"folder": "../../data/secret", "train_tokens": 10, "fingerprint": "f"},
        "tokenizer": {"kind": "C:\\tok"},
        "machine": "CPU (2 threads)",
        "versions": {"nnx": "1"},
        "init_from": "/home/ada/weights/base",
        "automatic": {"lr": "derived: /home"},
    }
    assert settings_of(config) == {
        "model": "my",
        "dim": 8,
        "lr": 0.1,
        "device": "cpu",
        "report": True,
        "train_tokens": 10,
        "data_fingerprint": "f",
        "machine": "CPU (2 threads)",
        "version_nnx": "1",
    }


def test_a_config_that_lacks_everything():
    assert settings_of({"model": None, "versions": None}) == {}


def test_a_sample_is_no_markup():
    assert sample_page("<b>", "</pre><script>\x1b") == (
        '<pre style="white-space: pre-wrap"><b>&lt;b&gt;</b>&lt;/pre&gt;&lt;script&gt;\\x1b</pre>'
    )
