"""Messages generated from proto/ (`python -m cluster.pb.generate`); they need protobuf, not gRPC."""
