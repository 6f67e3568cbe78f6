"""Messages and service stubs generated from proto/. The messages need no gRPC."""
