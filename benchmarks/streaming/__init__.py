"""Streaming caches over long texts."""
