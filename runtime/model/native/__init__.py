"""Kernels of our own for decoding on a CPU, compiled on the machine; the torch decoder is there where they are not.

They make a row's result independent, bit for bit, of the other rows in its step (kernels.cpp says how), in float32
and in bfloat16, and they cost a small step little more than reading the weights once.
"""

from runtime.model.native.build import available, library

__all__ = ["available", "library"]
