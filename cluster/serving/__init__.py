"""The engine's door: the gRPC service."""
