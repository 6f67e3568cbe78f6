"""Process groups, memory that ranks of one machine share, and devices; collectives are no-ops at size 1."""
