"""A step's latency on a GPU, projected from stated constants, beside published figures."""
