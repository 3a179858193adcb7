"""`nnx report`: runs as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnx_cli.commands._options import command, runs_named
from nnx_cli.console.output import Output
from nnx_cli.errors import CheckpointError, OutputError, UsageError, counted

EXAMPLES = """Examples:

  nnx report
  nnx report book-a book-b book-c
  nnx report book --csv book.csv"""

Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN",
        help="Run folders or their names.",
        show_default="the newest run",
        autocompletion=runs_named,
    ),
]


@command()
def run(
    output: Output,
    runs: Runs = None,
    csv: Annotated[
        Path | None, typer.Option(help="File to write the numbers of metrics.jsonl to, as CSV; - prints them.")
    ] = None,
) -> None:
    """Draw a run as a page that opens anywhere: report.html in its folder. Several runs: a page that compares them."""
    from nnx_cli.reporting import run_record
    from nnx_cli.reporting.comparison_page import comparison_page
    from nnx_cli.reporting.page import BEGINNING, write_page
    from nnx_cli.reporting.run_page import NAME, run_page
    from nnx_cli.runs.find import WEIGHTS, find_model, find_runs
    from nnx_cli.system.files import replace_file

    folders = [find_model(name).folder for name in runs] if runs else find_runs()[:1]
    if not folders:
        raise CheckpointError(f"there is no run in {WEIGHTS}/ yet", fix="train one: nnx train --filepath FILE")
    records = run_record.read_runs(folders)
    several = len(records) > 1
    page = (records[0].folder.parent if several else records[0].folder) / NAME
    run_record.refuse_foreign(page, [BEGINNING.encode()], "move it away")
    drawn = comparison_page(records) if several else run_page(records[0])
    numbers = None if csv is None or csv == Path("-") else csv
    if numbers is not None:
        if numbers.resolve() == page.resolve():
            raise UsageError(f"--csv {numbers} is where the page goes", fix="name another file: --csv FILE")
        run_record.refuse_foreign(numbers, run_record.OWN_CSV, "name another file: --csv FILE")
    made = numbers is not None and not numbers.exists()
    try:
        if numbers is not None:
            replace_file(numbers, run_record.to_csv(records).encode())
        write_page(page, drawn)
    except OutputError:
        if made and numbers is not None:
            numbers.unlink(missing_ok=True)
        raise
    output.made = page
    for record in records:
        if not record.metrics:
            output.warn(f"{record.folder / 'metrics.jsonl'} has no step to draw")
        for name, lines in record.damaged.items():
            if lines:
                output.warn(f"{record.folder / name}: {counted(lines, 'damaged line')} left out")
        for line in [] if several else record.snapshots[1]:  # a comparison does not read them
            output.warn(f"{line}; left out")
    output.show_json({"out": str(page), "runs": [str(each.folder) for each in records], "csv": csv and str(csv)})
    what = f"{counted(len(records), 'run')} compared" if several else f"run {records[0].name}, {records[0].state}"
    told = f"{page}: {what}; open it in a browser"
    if csv is not None and numbers is None:
        output.stream(run_record.to_csv(records))
        output.note(told)
    else:
        output.show(told, *([f"{numbers}: the numbers"] if numbers else []))
