from nnx_cli.cli import main

main()
