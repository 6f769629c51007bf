"""Commands of the command line, one dataclass each: its fields are the options, `run` is a call of the public API."""
