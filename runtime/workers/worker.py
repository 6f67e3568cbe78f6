"""One rank: a shard of the model and of every cache slot. Plan in, chosen tokens out."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runtime.config import Config
from runtime.core import Share
from runtime.mesh import mesh as meshes
from runtime.mesh.control import Control
from runtime.mesh.device import pick_device
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.cuda.graphs import GraphedDecoder
from runtime.model.decoder import Decoder
from runtime.model.directory import resolve_model
from runtime.model.loader import load_decoder
from runtime.model.native.decoder import NativeDecoder
from runtime.model.sampler import Sampled
from runtime.model.spec import ModelSpec
from runtime.retention import layer_groups
from runtime.step import Int32, StepPlan, WireLayout

AnyDecoder = Decoder | NativeDecoder | GraphedDecoder
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
        self.caches = self.decoder.make_caches(groups, scheduler.max_sequences, max_staged=scheduler.max_rows)
        self._last = self._share(StepPlan.empty())
        self._unclean: set[int] = set()  # slots in whose rows the last step had NaN or infinities

    def _share(self, plan: StepPlan) -> Share:
        return Share(plan.rows, plan.sequences, self.mesh.replica, self._min_rows)

    def step(self, plan: StepPlan) -> Int32:
        """Commit, run this replica's rows, and return per row the token it chose (-1: none, NOT_A_NUMBER: it has none)
        and, packed, the likeliest ones. [T local, 1 + top_k]"""
        if not plan.num_rows:
            return np.zeros((0, 1 + plan.top_k), np.int32)  # a heartbeat: what is staged stays staged
        self._commit(plan)
        self._last = share = self._share(plan)
        for slot, num_coming in share.turns:
            for cache in self.caches:
                cache.begin_turn(slot, num_coming)
        if not share.num_rows:
            return np.zeros((0, 1 + plan.top_k), np.int32)
        hidden = self.decoder.forward(RowBatch.of(share, self.mesh.device), self.caches)
        results = np.zeros((0, 1 + plan.top_k), np.int32)
        if len(wanted := share.wanted):
            results = self.decoder.choose(hidden, wanted, plan.top_k, _sampled(plan, share))
        chosen, without = share.spread(results)
        self._unclean.update(without)
        return chosen

    def _commit(self, plan: StepPlan) -> None:
        """Move accepted rows of the last step into the caches; LP peers copy them from the replica that ran them."""
        for slot, source, staged, accepted in self._last.commits(plan.commits):
            for cache in self.caches:
                if source < 0 or self.mesh.lp == 1:
                    cache.commit(slot, staged, accepted)
                elif source == self.mesh.replica:
                    self.mesh.broadcast_from_replica(cache.read_staged(slot, staged), source)
                    cache.commit(slot, staged, accepted)
                else:
                    block = self.mesh.broadcast_from_replica(cache.empty_block(len(staged)), source)
                    cache.append(slot, block, accepted)
        for slot in self._unclean:
            for cache in self.caches:
                cache.clean(slot)
        self._unclean.clear()
        for slot in plan.resets.tolist():
            for cache in self.caches:
                cache.reset(slot)


def _sampled(plan: StepPlan, share: Share) -> Sampled | None:
    """Which of the wanted rows choose by chance."""
    if not len(index := share.sampled):
        return None
    rows = plan.rows[share.local[share.wanted[index]]]
    return Sampled(index, rows, plan.sequences[share.sequence_of[index]])


def decoder_of(config: Config, spec: ModelSpec, mesh: Mesh) -> AnyDecoder:
    """The model as this rank runs it. Raises ConfigError where the config asks for what cannot be had."""
    model = config.model
    directory, dtype = resolve_model(model.path), getattr(torch, model.dtype)
    decoder = load_decoder(directory, spec, mesh, dtype, "native" if model.deterministic else model.kernels)
    if model.cuda_graphs and mesh.device.type == "cuda" and isinstance(decoder, Decoder):
        return GraphedDecoder(decoder)
    return decoder


def serve(
    config: Config, spec: ModelSpec, rank: int, host: str, port: int, make_decoder: DecoderMaker | None = None
) -> None:
    """Be worker `rank` (from 1) of the mesh whose coordinator waits at host:port, until it says stop.

    `make_decoder`: what it computes with, if not the model.
    """
    parallel = config.parallel
    torch.set_num_threads(parallel.threads_each(os.cpu_count() or 1, parallel.num_workers))
    device = pick_device(config, (rank - 1) % max(torch.cuda.device_count(), 1))
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    store.set(alive_key(rank), "")
    layout = wire_layout(config)
    control, mesh = meshes.join(rank, parallel.lp, parallel.tp, device, store, layout)
    assert mesh is not None
    try:
        worker = Worker(config, spec, mesh, make_decoder)
        gc.freeze()  # what is here stays: looking through it for garbage would hold up a step for milliseconds
        _loop(worker, control, layout)
    finally:  # a peer that waits for this rank learns at once that it has gone
        mesh.close()
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


def alive_key(rank: int) -> str:
    """The store key that worker `rank` sets once it is there."""
    return f"alive/{rank}"


def wire_layout(config: Config) -> WireLayout:
    return WireLayout(config.scheduler.max_rows, config.scheduler.max_sequences)
