"""`python -m benchmarks.training`."""

import typer

from benchmarks.training.main import main

if __name__ == "__main__":
    typer.run(main)
