"""The command line: `main`, and a file per group of commands."""
