import pytest

from nnx_cli.commands._config_file import read_toml
from nnx_cli.errors import DataError, UsageError

SETTINGS = 'model = "nyx"\nmax-steps = 5  # größer, больше\n'


@pytest.fixture
def toml(tmp_path):
    def write(content):
        path = tmp_path / "settings.toml"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-16-be"])
def test_settings_as_any_editor_writes_them(toml, encoding):
    assert read_toml(toml(SETTINGS.encode(encoding))) == {"model": "nyx", "max_steps": 5}


def test_settings_in_the_encoding_of_a_country(toml):
    assert read_toml(toml('sample_prompt = "Größe für Öl"'.encode("cp1252"))) == {"sample_prompt": "Größe für Öl"}
    assert read_toml(toml('sample_prompt = "Жили-были"'.encode("cp1251"))) == {"sample_prompt": "Жили-были"}


@pytest.mark.parametrize(
    "content",
    [
        b"lr = ",
        b"[train",
        b"lr = 1\nlr = 2",
        b"\xff\xfe\x00",
        b"a = " + b"[" * 5000,
        bytes(99),
        b"\x89PNG\r\n\x1a\n",
        b"#" * 2**21,
    ],
)
def test_what_is_no_toml_is_refused(toml, content):
    with pytest.raises(UsageError, match="is not TOML|is not text|more than") as refused:
        read_toml(toml(content))
    assert str(refused.value).count("settings.toml") == 1


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "a\0b", tmp_path / "\ud800", tmp_path / ("x" * 5000)):
        with pytest.raises(DataError, match="cannot read --config"):
            read_toml(path)
