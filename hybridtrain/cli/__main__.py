"""`python -m hybridtrain.cli <command> [overrides]`: the console script without its file."""

from hybridtrain.cli.main import program

program()
