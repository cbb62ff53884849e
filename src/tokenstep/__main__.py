"""``python -m tokenstep``: the command line."""

from tokenstep.cli.main import main

if __name__ == "__main__":
    main()
