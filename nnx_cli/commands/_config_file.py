"""A file of settings that an option such as `--config` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnx_cli.config import parse_toml
from nnx_cli.errors import DataError, UsageError
from nnx_cli.system.files import why_not_opened

MAX_BYTES = 2**20


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file in any encoding that text may have, as `parse_toml` gives them.

    Raises DataError where the file cannot be read, UsageError where it is no TOML.
    """
    return parse_toml(read_settings_text(path, "--config"), f"--config {path}")


def read_settings_text(path: Path, option: str) -> str:
    """The text of a file of settings that an option names, in any encoding that text may have.

    Raises DataError where the file cannot be read, UsageError where it is no text.
    """
    from nnx_cli.data.charset import read_text
    from nnx_cli.data.compression import Stream

    try:
        with Stream(open(path, "rb", buffering=0), f"{option} {path}") as stream:
            return read_text(stream, MAX_BYTES)[0]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {option} {path}: {why_not_opened(error)}") from error
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise UsageError(str(error)) from error
