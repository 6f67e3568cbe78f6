"""`python -m benchmarks.roofline`."""

import typer

from benchmarks.roofline.published import main

if __name__ == "__main__":
    typer.run(main)
