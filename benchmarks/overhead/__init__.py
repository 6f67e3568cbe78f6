"""What a step costs around the model: planning, transport, caches' accounts, verification. docs/benchmarks.md."""
