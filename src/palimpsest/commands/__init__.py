"""One module per thing that is typed: `Options`, a frozen dataclass, is its command line, and `run` is what it does."""
