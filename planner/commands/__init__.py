"""One module for each command: `run(args) -> exit code`. Imported only when its command is given."""
