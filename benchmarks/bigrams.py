"""What the embedded model says behind each token, asked anew: beside the table that comes with the program, or in its
place.

    python -m benchmarks.bigrams            # how much of the shipped table is what the model says
    python -m benchmarks.bigrams --write    # ship what it says
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import typer

from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.engine.scheduler import TOP_K
from runtime.step import TOP_BITS
from runtime.tuning import priming


def main(write: Annotated[bool, typer.Option("--write", help="Replace the shipped table.")] = False) -> None:
    priming.BUDGET_S = math.inf
    with Engine.from_config(Config.from_dict({"lookahead": {"enabled": False}})) as engine:
        top = priming.ask(engine.executor, engine.config, engine.spec, engine.tokenizer.opening(), TOP_K)
    if write:
        priming.ship(top)
    shipped = priming.shipped()
    first = (shipped[:, 0] >> TOP_BITS == top[:, 0] >> TOP_BITS).mean() if shipped.shape == top.shape else 0.0
    among = np.mean([len(np.intersect1d(a, b)) for a, b in zip(shipped >> TOP_BITS, top >> TOP_BITS, strict=True)])
    size = priming.SHIPPED.stat().st_size / 2**20
    print(f"{len(top):,} tokens: the likeliest agrees for {first:.2%}, {among:.2f} of {TOP_K} do; {size:.2f} MiB")


if __name__ == "__main__":
    typer.run(main)
