"""One rank: a shard of the model and of every cache slot. Plan in, chosen tokens out.

What a plan brings besides its rows (accepted rows of the last step, slots that begin anew, turns) is done whole or not
at all: what has to come from other replicas is fetched first. So a rank is always just behind one step or the next, and
says which where the mesh is formed anew.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from runtime.config import Config
from runtime.core import Share
from runtime.errors import PeerError
from runtime.mesh import mesh as meshes
from runtime.mesh.control import Control
from runtime.mesh.device import pick_device
from runtime.mesh.group import JOIN_TIMEOUT_S
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.cuda.graphs import GraphedDecoder
from runtime.model.cuda.paged_cache import PagedKVCache
from runtime.model.decoder import Decoder
from runtime.model.directory import resolve_model
from runtime.model.loader import load_decoder
from runtime.model.native.decoder import NativeDecoder
from runtime.model.spec import ModelSpec
from runtime.retention import layer_groups
from runtime.step import Int32, StepPlan, WireLayout, next_number
from runtime.workers import roster
from runtime.workers.controls import Controls
from runtime.workers.roster import Call, Place, Report

if TYPE_CHECKING:
    from runtime.model.cuda.decoder import CudaDecoder

log = logging.getLogger(__name__)

AnyDecoder: TypeAlias = "Decoder | NativeDecoder | GraphedDecoder | CudaDecoder"
DecoderMaker = Callable[[Config, ModelSpec, Mesh], Any]
"""What has the surface of runtime.model.decoder.Decoder."""

MIN_ROWS = 2
"""On torch's kernels a step with a single row runs it twice: those for one row differ from those for more, and
lookahead on and off must not differ (see runtime.model.layers.Linear)."""


class Worker:
    """Executes plans. The same class serves one process and every rank of a mesh."""

    def __init__(self, config: Config, spec: ModelSpec, mesh: Mesh, make_decoder: DecoderMaker | None = None) -> None:
        self.mesh = mesh
        self.decoder = (make_decoder or decoder_of)(config, spec, mesh)
        self._min_rows = MIN_ROWS if isinstance(self.decoder, Decoder | GraphedDecoder) else 1
        groups = layer_groups(config.cache, spec.num_layers, spec.max_positions)
        scheduler = config.scheduler
        self.caches: tuple[Any, ...] = self.decoder.make_caches(
            groups, scheduler.num_slots, max_staged=scheduler.max_rows
        )
        self.num_pages = pages_of(self.caches)
        self.controls = Controls()
        self.applied: int | None = None
        """Number of the last plan of which this rank has done all but, perhaps, its rows; None: its caches are none."""
        self._last = self._share(StepPlan.empty())
        self._unclean: set[int] = set()  # slots in whose rows the last step had NaN or infinities

    def _share(self, plan: StepPlan) -> Share:
        return Share(plan.rows, plan.sequences, self.mesh.replica, self._min_rows)

    def step(self, plan: StepPlan) -> Int32:
        """Commit, run this replica's rows, and return per row the token it chose (-1: none, NOT_A_NUMBER: it has none)
        and, packed, the likeliest ones. [T local, 1 + top_k]"""
        if not plan.num_rows:
            return np.zeros((0, plan.result_width), np.int32)  # a heartbeat: what is staged stays staged
        share = self._share(plan)
        assert self.applied is not None, "caches are emptied, or copied, first"
        if plan.number == next_number(self.applied):
            self._apply(plan, share)
            self.applied = plan.number
        elif plan.number != self.applied:  # rows of the step before, for ranks that are still behind it
            return np.zeros((0, plan.result_width), np.int32)
        self._last = share
        if not share.num_rows:
            return np.zeros((0, plan.result_width), np.int32)
        batch = RowBatch.of(share, self.decoder.batch_device)
        asked = self.controls.sampled(plan, share), self.controls.logprobs(plan, share)
        results = self.decoder.step(batch, self.caches, share.wanted, plan.top_k, *asked)
        chosen, without = share.spread(results)
        self._unclean.update(without)
        return chosen

    def _apply(self, plan: StepPlan, share: Share) -> None:
        """Move accepted rows of the last step into the caches, and begin slots and turns."""
        commits = self._last.commits(plan.commits)
        blocks = self._exchange(commits)
        for slot, _, staged, accepted in commits:
            self.controls.commit(slot, accepted)
            for cache in self.caches:
                block = blocks.get((slot, cache))
                if block is None:
                    cache.commit(slot, staged, accepted)
                else:
                    cache.append(slot, block, accepted)
        for slot in self._unclean:
            for cache in self.caches:
                cache.clean(slot)
        self._unclean.clear()
        for slot in plan.resets.tolist():
            self.controls.reset(slot)
            for cache in self.caches:
                cache.reset(slot)
        for slot, source, length in plan.reuses.tolist():
            self.controls.begin_as(slot, source, length)
            for cache in self.caches:
                cache.begin_as(slot, source, length)
        for slot, num_coming in share.turns:
            for cache in self.caches:
                cache.begin_turn(slot, num_coming)
        if share.turns:
            self.controls.begin_turns(plan)

    def _exchange(self, commits: list[tuple[int, int, list[int], list[int]]]) -> dict[tuple[int, Any], torch.Tensor]:
        """Keys and values of accepted rows that this replica has not run, by slot and cache, from the one that has.

        Raises PeerError, on all shards of a replica or on none.
        """
        blocks = {}
        mesh, copies = self.mesh, False
        for slot, source, staged, _ in commits:
            if source < 0 or mesh.lp == 1:
                continue
            copies = True
            for cache in self.caches:
                if source == mesh.replica:
                    mesh.broadcast_from_replica(cache.read_staged(slot, staged), source)
                else:
                    block = cache.empty_block(len(staged))
                    blocks[slot, cache] = mesh.broadcast_from_replica(block, source)
        if copies:
            mesh.meet_shards()
        return blocks

    # Where the mesh is formed anew

    def forget(self, applied: int) -> None:
        """Empty all slots, as all others do; the last step was the one with this number."""
        for slot in range(len(self.caches[0].retained)):
            self.controls.reset(slot)
            for cache in self.caches:
                cache.reset(slot)
        self.applied, self._last = applied, self._share(StepPlan.empty())
        self._unclean.clear()

    def copy_caches(self, source: int, targets: Collection[int]) -> None:
        """Give replicas `targets` all that the slots of `source` have. Every replica takes part. Raises PeerError."""
        mesh = self.mesh
        gives, takes = mesh.replica == source, mesh.replica in targets
        text = json.dumps(self._described()).encode() if gives else b""
        size = mesh.broadcast_from_replica(torch.tensor([len(text)], device=mesh.device), source)
        described = torch.zeros(int(size), dtype=torch.uint8, device=mesh.device)
        if gives:
            described.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        description = json.loads(mesh.broadcast_from_replica(described, source).cpu().numpy().tobytes())
        if takes:
            self.forget(description["applied"])
            self.applied = None  # until all is here
        for slot, controls, states, shapes in description["slots"]:
            if takes:
                self.controls.restore(slot, controls)
            for cache, state, parts in zip(self.caches, states, shapes, strict=True):
                if takes:
                    cache.restore(slot, state)
                if gives:
                    blocks = [part.contiguous() for part in cache.contents(slot)]
                else:
                    blocks = [torch.empty(shape, dtype=cache.dtype, device=cache.device) for shape in parts]
                for block in blocks:
                    if block.numel():
                        mesh.broadcast_from_replica(block, source)
                if takes:
                    cache.refill(slot, blocks)
        if takes:
            self.applied = description["applied"]

    def _described(self) -> dict[str, Any]:
        """The slots that have something, and the shapes of what is in them."""
        slots = []
        for slot in range(len(self.caches[0].retained)):
            if any(cache.retained[slot].length for cache in self.caches):
                states = [cache.state(slot) for cache in self.caches]
                shapes = [[list(part.shape) for part in cache.contents(slot)] for cache in self.caches]
                slots.append((slot, self.controls.state(slot), states, shapes))
        return {"applied": self.applied, "slots": slots}


def decoder_of(config: Config, spec: ModelSpec, mesh: Mesh) -> AnyDecoder:
    """The model as this rank runs it. Raises ConfigError where the config asks for what cannot be had."""
    directory, dtype = resolve_model(config.model.path), getattr(torch, config.model.dtype)
    kernels, on_cpu = config.model.kernels, mesh.device.type == "cpu"
    if kernels == "triton":
        kernels = "torch"
    elif config.model.deterministic and on_cpu:
        kernels = "native"
    decoder = load_decoder(directory, spec, mesh, dtype, kernels)
    if not isinstance(decoder, Decoder) or on_cpu and config.model.kernels != "triton":
        return decoder
    from runtime.model.cuda.choice import decoder_for_gpu  # here: importing Triton takes a third of a second

    return decoder_for_gpu(config, decoder)


def pages_of(caches: Sequence[Any]) -> tuple[int, ...] | None:
    """How many pages each has; None where slots have memory of their own."""
    paged = [cache.num_pages for cache in caches if isinstance(cache, PagedKVCache)]
    return tuple(paged) if paged else None


def serve(config: Config, spec: ModelSpec, place: Place, make_decoder: DecoderMaker | None = None) -> None:
    """Be the worker of this place: load its shard, then take part in every mesh that the coordinator calls it to, until
    that says stop.

    `make_decoder`: what it computes with, if not the model.
    """
    parallel = config.parallel
    torch.set_num_threads(parallel.threads_each(os.cpu_count() or 1, parallel.num_workers))
    device = pick_device(config, place.position % max(torch.cuda.device_count(), 1))
    patience = timedelta(seconds=JOIN_TIMEOUT_S)
    store = dist.TCPStore(place.host, place.port, is_master=False, timeout=patience)
    shares_device = not place.own_device and parallel.num_workers > torch.cuda.device_count()
    mesh = Mesh(parallel.lp, parallel.tp, 0, place.shard, device, shares_device=shares_device)
    mesh.ordered = config.model.deterministic
    worker = Worker(config, spec, mesh, make_decoder)
    gc.freeze()  # what is here stays: looking through it for garbage would hold up a step for milliseconds
    layout = wire_layout(config)
    for number in itertools.count():
        call = roster.attend(store, place.worker, number, Report(worker.applied, worker.num_pages))
        if call is None:
            return
        try:
            if _take_part(worker, call, place.host, store, layout):
                return
        except PeerError as error:
            log.info("worker %d leaves mesh %d: %s", place.worker, call.mesh, error)


def _take_part(worker: Worker, call: Call, host: str, store: dist.Store, layout: WireLayout) -> bool:
    """Be a rank of one mesh. Returns when the coordinator says stop, which is when it returns True."""
    control: Control | None = None
    try:
        control = meshes.join(call.rank, call.lp, worker.mesh.tp, host, store, f"mesh/{call.mesh}", layout, worker.mesh)
        if hasattr(worker.decoder, "forget_graphs"):  # decoders without graphs have none to forget
            worker.decoder.forget_graphs()
        if call.source is None:
            worker.forget(call.applied)
        elif call.targets:
            worker.copy_caches(call.source, call.targets)
        _loop(worker, control, layout)
        return True
    finally:  # a peer that waits for this rank learns at once that it has gone
        worker.mesh.leave()
        if control is not None:
            control.close()


def _loop(worker: Worker, control: Control, layout: WireLayout) -> None:
    while True:
        plan = layout.decode(control.receive())
        if plan.stop:
            return
        started = time.perf_counter()
        chosen = worker.step(plan)
        if control.answers:
            result = np.zeros(layout.result_words(plan, worker.mesh.lp), np.int32)
            result[layout.RESULT_HEADER :][: chosen.size] = chosen.ravel()
            result[0] = int((time.perf_counter() - started) * 1e6)
            control.reply(result)


def wire_layout(config: Config) -> WireLayout:
    return WireLayout(config.scheduler.max_rows, config.scheduler.num_slots)
