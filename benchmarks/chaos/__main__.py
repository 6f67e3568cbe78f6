"""`python -m benchmarks.chaos`."""

import typer

from benchmarks.chaos.main import main

if __name__ == "__main__":
    typer.run(main)
