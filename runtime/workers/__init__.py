"""One rank's loop, and how the engine reaches the ranks: in this process, or as processes of their own."""
