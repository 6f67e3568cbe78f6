"""What both ends of a gRPC connection go by: the size of messages, and kinds of compression."""

from __future__ import annotations

from typing import Literal

import grpc

MAX_MESSAGE_BYTES = 16 * 2**20

Compression = Literal["none", "deflate", "gzip"]
COMPRESSIONS = {
    "none": grpc.Compression.NoCompression,
    "deflate": grpc.Compression.Deflate,
    "gzip": grpc.Compression.Gzip,
}
