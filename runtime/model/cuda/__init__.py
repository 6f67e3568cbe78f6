"""What makes a step fast on a GPU: kernels in Triton, paged caches, and CUDA graphs. See docs/gpu.md."""
