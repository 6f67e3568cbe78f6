"""What stands before every gRPC call: without a token that is known, nothing but the health service answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cluster.serving import calls
from cluster.serving.access import authorization_of
from cluster.serving.desk import Desk
from cluster.wire.statuses import UnauthenticatedError

OPEN = "/grpc.health.v1.Health/"


class Gate(grpc.aio.ServerInterceptor):
    """Reflection and the server's description are behind it, too."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        tokens = self._desk.tokens
        if tokens is not None and not handler_call_details.method.startswith(OPEN):
            try:
                tokens.caller(authorization_of(handler_call_details.invocation_metadata))
            except UnauthenticatedError as error:
                self._desk.refused(error)
                return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: UnauthenticatedError) -> grpc.RpcMethodHandler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await calls.abort(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)
