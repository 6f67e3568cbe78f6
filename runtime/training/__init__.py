"""Training under the caches: what a token sees in training is what it will see when the model is served."""
