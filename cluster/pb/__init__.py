"""Service stubs generated from proto/; the messages they carry are in runtime/pb."""
