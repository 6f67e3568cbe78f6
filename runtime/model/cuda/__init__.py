"""What makes a step fast on a GPU: CUDA graphs."""
