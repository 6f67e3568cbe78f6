"""Workers as Ray actors: where they are placed, and how they are watched and ended."""
