"""What is measured once per machine and model: the cost of a step, the model's bigrams, the fastest split."""
