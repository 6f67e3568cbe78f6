"""Tokens per step and latency against workers, how they are split, rows per step and candidate sources."""
