"""`python -m nnx_cli`: the command `nnx`."""

from nnx_cli.cli import main

main()
