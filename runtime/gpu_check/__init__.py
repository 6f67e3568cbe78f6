"""What a GPU does with our kernels: whether it is right, which bits it gives, and what it takes. docs/gpu.md."""
