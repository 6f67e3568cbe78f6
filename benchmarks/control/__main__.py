"""`python -m benchmarks.control`."""

import typer

from benchmarks.control.main import main

if __name__ == "__main__":
    typer.run(main)
