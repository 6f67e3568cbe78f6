"""`python -m benchmarks.scaling`."""

import typer

from benchmarks.scaling.main import main

if __name__ == "__main__":
    typer.run(main)
