"""Finding architectures by name."""

import subprocess
import sys

import pytest

from nnx_cli import models
from nnx_cli.errors import UsageError


def test_names_are_the_files():
    assert models.names() == sorted(models.names())
    assert {"llama", "nyx"} <= set(models.names())
    assert not any(name.startswith("_") for name in models.names())


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(UsageError, match="'lama'; did you mean llama") as error:
        models.build("lama")
    assert "nyx" in error.value.fix


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(UsageError, match="--n-wheels"):
        models.make_config("nyx", n_wheels=4)


def test_reading_options_imports_no_torch():
    code = "from nnx_cli import models; import sys; [models.config_fields(n) for n in models.names()]; "
    code += "[models.sizes(n) for n in models.names()]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_older_name_of_the_original_variant_is_read_and_not_written():
    for name in models.names():
        config = models.make_config(name, variant="seed")
        assert config == models.make_config(name, variant="original")
        assert models.config_dict(config)["variant"] == "original"
