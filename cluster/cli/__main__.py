"""`python -m cluster.cli`: the outrider command."""

from cluster.cli.commands import main

if __name__ == "__main__":
    main()
