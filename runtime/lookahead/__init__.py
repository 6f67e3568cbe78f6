"""Deciding what a step's rows are: pure Python, without tensors, processes or a model."""
