"""Owns requests: admit, plan, execute, verify, emit."""
