"""Pages that a command keeps up to date beside its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnx_cli.console.output import Output
from nnx_cli.errors import OutputError


def page_writer(
    output: Output, path: Path, draw: Callable[[Mapping[str, Any]], str]
) -> Callable[[Mapping[str, Any]], None]:
    """Writes the page that `draw` makes of a record; where the disk refuses, or a file there is not ours, says so and
    leaves it."""
    from nnx_cli.reporting.page import BEGINNING, write_page
    from nnx_cli.reporting.run_record import refuse_foreign

    def write(record: Mapping[str, Any]) -> None:
        try:
            refuse_foreign(path, [BEGINNING.encode()], "move it away")
            write_page(path, draw(record))
        except OutputError as error:
            output.warn(str(error))

    return write
