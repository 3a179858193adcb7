"""One more architecture is one new file in `nnx_cli/models/`: a copy of the package gets one, and every command knows
it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnx_cli

COMMANDS = """
import sys
from typer.testing import CliRunner
from nnx_cli.cli import app

for line in sys.stdin.read().splitlines():
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, (line, result.output, result.exception)
    print(result.stdout if "--json" in line or "--help" in line else "", end="\\x00")
"""


def test_a_new_file_is_a_new_architecture(tmp_path, text_file):
    package = tmp_path / "package" / "nnx_cli"
    shutil.copytree(Path(nnx_cli.__file__).parent, package, ignore=shutil.ignore_patterns("*.pyc.*"))
    source = (package / "models" / "llama.py").read_text(encoding="utf-8")
    source = source.replace(
        "tie_embeddings: bool", "seventh_sense: bool = True  # an option of its own\n    tie_embeddings: bool", 1
    )
    (package / "models" / "seventh.py").write_text(source, encoding="utf-8")
    small = "--dim 32 --n-layers 2 --n-heads 2 --seq-len 32 --batch-size 2 --grad-accum 1 --threads 1 --sample-every 0"
    lines = [
        "train --model seventh --help",
        f"train --model seventh --filepath {text_file} --max-steps 2 --no-seventh-sense {small} --json",
        "sample --max-new-tokens 3 --json",
        "summarize --size nano --json",
        "quantize --max-drop 9 --json",
    ]
    environment = dict(os.environ, PYTHONPATH=str(package.parent), COLUMNS="200")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(lines),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    help_text, trained, sampled, zoo, receipt = done.stdout.split("\x00")[:5]
    assert "seventh" in help_text and "--seventh-sense" in help_text
    assert json.loads(trained)["status"] == "finished"
    assert json.loads(sampled)["samples"][0]["tokens"] == 3
    assert "seventh" in [facts["model"] for facts in json.loads(zoo)]
    assert json.loads(receipt)["bits"] == 8
