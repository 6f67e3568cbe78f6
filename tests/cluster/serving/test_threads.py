"""What takes long for one message holds up no other."""

from __future__ import annotations

import asyncio
import os
import threading

from cluster.serving.threads import SHORT_BYTES, RequestThreads


def test_long_messages_wait_for_each_other_and_short_ones_for_nobody() -> None:
    threads, released, order = RequestThreads(), threading.Event(), []

    def slow() -> str:
        assert released.wait(30)
        return "slow"

    async def run() -> None:
        long = [asyncio.create_task(threads.run(SHORT_BYTES + 1, slow)) for _ in range(8)]
        order.append(await threads.run(SHORT_BYTES, str.upper, "short"))
        assert not any(task.done() for task in long)
        released.set()
        order.extend(await asyncio.gather(*long))

    asyncio.run(asyncio.wait_for(run(), 60))
    threads.close()
    assert order == ["SHORT", *["slow"] * 8]


def test_who_reads_a_long_message_lets_others_go_first() -> None:
    threads = RequestThreads()

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def both() -> tuple[int, int]:
        return await threads.run(1, priority), await threads.run(SHORT_BYTES + 1, priority)

    short, long = asyncio.run(both())
    threads.close()
    assert long > short or short >= 15
