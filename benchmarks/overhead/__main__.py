"""`python -m benchmarks.overhead`."""

import typer

from benchmarks.overhead.main import main

if __name__ == "__main__":
    typer.run(main)
