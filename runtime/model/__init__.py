"""The tensor-parallel decoder: what a model looks like, how its weights load, how it runs."""
