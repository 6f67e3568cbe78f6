"""`python -m benchmarks.streaming`."""

import typer

from benchmarks.streaming.main import main

if __name__ == "__main__":
    typer.run(main)
