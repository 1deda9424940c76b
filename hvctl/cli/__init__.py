"""The command line: parses, calls one operation, renders. Heavy imports happen inside commands, so that --help and
completion stay fast."""
