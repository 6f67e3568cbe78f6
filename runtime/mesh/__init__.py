"""Process groups, memory that ranks of one machine share, and devices; collectives are no-ops at size 1."""

LOOPBACK = "127.0.0.1"
"""Where the ranks of one machine meet."""
