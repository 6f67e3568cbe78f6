"""The published orders of training under caches, at toy scale."""
