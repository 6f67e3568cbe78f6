"""What talks to a server, and the one interface for an engine here and one behind an address."""
