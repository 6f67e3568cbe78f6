"""Many machines and the outside world: Ray, gRPC and the command line. `runtime` knows none of them."""
