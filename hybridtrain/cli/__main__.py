"""`python -m hybridtrain.cli <command> [overrides]`: the same as the console script `hybridtrain`."""

from hybridtrain.cli.main import program

program()
