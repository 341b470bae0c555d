"""`hybridtrain <command> [overrides]`: the command line, one caller of the library."""
