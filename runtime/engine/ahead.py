"""What a first start on a machine compiles, begun before anything else: it goes on while the model is read.

The threads import nothing that imports `runtime.core`: two threads that wait for each other's imports get
half a module.
"""

from __future__ import annotations

import functools

from runtime import build, compiler
from runtime.config import Config


@functools.cache
def compile_core() -> None:
    """Begin to compile what guessing needs, once in this process."""
    compiler.compile_ahead([build.compiled])


@functools.cache
def _compile_for_cpus() -> None:
    compiler.compile_ahead([_kernels])


@functools.cache
def _compile_for_ranks() -> None:
    compiler.compile_ahead([_meeting_point])


def compile_all(config: Config) -> None:
    """Begin to compile what an engine of this config will need."""
    compile_core()
    import torch  # noqa: F401  # here, where it is awaited: a program that ends while a thread imports it complains

    if config.model.device != "cuda" and config.model.kernels != "torch":
        _compile_for_cpus()
    if config.parallel.tp > 1 or config.parallel.split == "auto":
        _compile_for_ranks()


def _kernels() -> None:
    import torch

    from runtime.model.native import build

    if not torch.cuda.is_available():
        build.library()


def _meeting_point() -> None:
    from runtime.mesh import shared_memory

    shared_memory.library()
