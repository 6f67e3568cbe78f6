"""`python -m benchmarks.quality`."""

import typer

from benchmarks.quality.main import main

if __name__ == "__main__":
    typer.run(main)
