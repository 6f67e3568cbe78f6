"""Does control over the output cost speed, or change a token? `python -m benchmarks.control`"""
