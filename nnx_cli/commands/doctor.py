"""`nnx doctor`: what is wrong with this machine's set-up."""

from __future__ import annotations

from dataclasses import asdict

from nnx_cli.commands._options import command
from nnx_cli.console.output import Output
from nnx_cli.errors import MissingFeature

EXAMPLES = """Examples:

  nnx doctor
  nnx doctor --quiet
  nnx doctor --json"""


@command()
def run(output: Output) -> None:
    """Look at this machine's set-up and say how to mend what is wrong."""
    from nnx_cli.system.doctor import diagnose

    findings = list(diagnose())
    output.show_json([asdict(finding) for finding in findings])
    for finding in findings:
        output.show(f"{finding.level:8}{finding.what}")
        if finding.fix:
            output.show(f"{'':8}  {finding.fix}")
    if any(finding.level == "error" for finding in findings):
        raise MissingFeature("training cannot work here; mend what is marked as error")
