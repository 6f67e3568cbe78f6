"""The HTTP door: what OpenAI's clients speak, on the same engine."""
