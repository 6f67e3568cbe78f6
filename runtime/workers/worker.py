"""One rank: a shard of the model and of every cache slot. Plan in, chosen tokens out."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from runtime.config import Config
from runtime.mesh import mesh as meshes
from runtime.mesh.device import pick_device, upload
from runtime.mesh.group import COLLECTIVE_TIMEOUT_S
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.cuda.graphs import GraphedDecoder
from runtime.model.decoder import Decoder
from runtime.model.loader import load_decoder, resolve_model
from runtime.model.native import NativeDecoder
from runtime.model.sampler import choose_tokens, sampled_rows, top_tokens
from runtime.model.spec import ModelSpec
from runtime.retention import layer_groups
from runtime.step import Choose, Commit, Int32, Row, Seq, StepPlan, WireLayout

AnyDecoder = Decoder | NativeDecoder | GraphedDecoder

MIN_ROWS = 2
"""On torch's kernels a step with a single row runs it twice: those for one row differ from those for more, and
lookahead on and off must not differ (see runtime.model.layers.Linear)."""

RESULT_HEADER = 1
"""Words before the rows in a result: the step's microseconds on this worker."""


class Worker:
    """Executes plans. The same class serves one process and every rank of a mesh."""

    def __init__(self, config: Config, spec: ModelSpec, mesh: Mesh) -> None:
        self.mesh = mesh
        self.decoder = make_decoder(config, spec, mesh)
        self._min_rows = 1 if isinstance(self.decoder, NativeDecoder) else MIN_ROWS
        groups = layer_groups(config.cache, spec.num_layers, spec.max_positions)
        scheduler = config.scheduler
        self.caches = self.decoder.make_caches(groups, scheduler.max_sequences, max_staged=scheduler.max_rows)
        self._last = StepPlan.empty()
        self._unclean: set[int] = set()  # slots in whose rows the last step had NaN or infinities

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> Int32:
        """Commit, run this replica's rows, and return per row the token it chose (-1: none, NOT_A_NUMBER: it has none)
        and, packed, the likeliest ones. [T local, 1 + top_k]"""
        local = plan.local_rows(self.mesh.replica)
        chosen = np.zeros((len(local), 1 + plan.top_k), np.int32)
        if not plan.num_rows:
            return chosen  # a heartbeat: what is staged stays staged
        self._commit(plan)
        self._last = plan
        for slot, num_coming in plan.sequences[:, [Seq.SLOT, Seq.NUM_COMING]].tolist():
            if num_coming:
                for cache in self.caches:
                    cache.begin_turn(slot, num_coming)
        if not len(local):
            return chosen
        rows = plan.rows[np.resize(local, max(len(local), self._min_rows))]
        sequence_of_slot = {int(line[Seq.SLOT]): index for index, line in enumerate(plan.sequences)}
        sequences = plan.sequences[[sequence_of_slot[slot] for slot in rows[:, Row.SLOT].tolist()]]
        batch = RowBatch.build(
            tokens=rows[:, Row.TOKEN],
            positions=rows[:, Row.POSITION],
            parents=_local_parents(rows[:, Row.PARENT], local),
            slots=rows[:, Row.SLOT],
            rope_lengths=sequences[:, Seq.ROPE_LENGTH],
            device=self.mesh.device,
        )
        hidden = self.decoder.forward(batch, self.caches)
        rows, sequences = rows[: len(local)], sequences[: len(local)]
        chosen[:, 0] = -1
        wanted = np.flatnonzero((rows[:, Row.CHOOSE] != Choose.NOTHING) & (rows[:, Row.OWNER] == self.mesh.replica))
        if len(wanted):
            rows, sequences, place = rows[wanted], sequences[wanted], (self.mesh, self.decoder.vocab_range)
            sampled = sampled_rows(rows, sequences)
            wanted_hidden = hidden[upload(wanted, hidden.device)]
            logits = self.decoder.search(wanted_hidden, max(plan.top_k, 1), keep_all=len(sampled) > 0)
            found = [choose_tokens(logits, rows, sequences, sampled, *place)[:, None]]
            if plan.top_k:
                found.append(top_tokens(logits, plan.top_k, *place))
            results = torch.cat(found, dim=1).cpu().numpy()
            if (without := results[:, 0] < 0).any():
                results[without, 1:] = 0
                self._unclean.update(rows[without, Row.SLOT].tolist())
            chosen[wanted] = results
        return chosen

    def _commit(self, plan: StepPlan) -> None:
        """Move accepted rows of the last step into the caches; LP peers copy them from the replica that ran them."""
        local = self._last.local_rows(self.mesh.replica)
        slots, tokens = self._last.rows[:, Row.SLOT], self._last.rows[:, Row.TOKEN]
        local_slots = slots[local]
        rows, sources = plan.commits[:, Commit.ROW], plan.commits[:, Commit.SOURCE]
        commit_slots = slots[rows]
        for slot in np.unique(commit_slots).tolist():
            mine = commit_slots == slot
            source = int(sources[mine][0])
            start = int(np.searchsorted(local_slots, slot)) if len(local_slots) else 0
            staged = (np.searchsorted(local, rows[mine]) - start).tolist()
            accepted = tokens[rows[mine]].tolist()
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


def make_decoder(config: Config, spec: ModelSpec, mesh: Mesh) -> AnyDecoder:
    """The model as this rank runs it. Raises ConfigError where the config asks for what cannot be had."""
    model = config.model
    directory, dtype = resolve_model(model.path), getattr(torch, model.dtype)
    decoder = load_decoder(directory, spec, mesh, dtype, "native" if model.deterministic else model.kernels)
    if model.cuda_graphs and mesh.device.type == "cuda" and isinstance(decoder, Decoder):
        return GraphedDecoder(decoder)
    return decoder


def _local_parents(parents: Int32, local: np.ndarray) -> Int32:
    """Parents as indices into `local`; a replica runs every ancestor of its rows."""
    return np.where(parents < 0, -1, np.searchsorted(local, parents)).astype(np.int32)


def serve(config: Config, spec: ModelSpec, rank: int, host: str, port: int) -> None:
    """Be worker `rank` (from 1) of the mesh whose coordinator waits at host:port, until it says stop."""
    parallel = config.parallel
    torch.set_num_threads(parallel.threads_each(os.cpu_count() or 1, parallel.num_workers))
    device = pick_device(config, (rank - 1) % max(torch.cuda.device_count(), 1))
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    store.set(alive_key(rank), "")
    control, mesh = meshes.join(rank, parallel.lp, parallel.tp, device, store)
    assert mesh is not None
    try:
        _loop(Worker(config, spec, mesh), control, wire_layout(config))
    finally:  # a peer that waits for this rank learns at once that it has gone
        mesh.close()
        control.close()


def _loop(worker: Worker, control: meshes.ControlGroup, layout: WireLayout) -> None:
    buffer = torch.zeros(layout.length, dtype=torch.int32)
    while True:
        control.plan_group.broadcast(buffer, source=0)
        plan = layout.decode(buffer.numpy())
        if plan.stop:
            return
        started = time.perf_counter()
        chosen = worker.step(plan)
        if control.result_group is not None:
            result = torch.zeros(result_words(plan, worker.mesh.lp), dtype=torch.int32)
            result[RESULT_HEADER : RESULT_HEADER + chosen.size] = torch.from_numpy(chosen.ravel())
            result[0] = int((time.perf_counter() - started) * 1e6)
            control.result_group.gather(result)


def result_words(plan: StepPlan, lp: int) -> int:
    """int32 words of a replica's result; as many on each, since a gather wants equal parts."""
    return RESULT_HEADER + plan.most_local_rows(lp) * (1 + plan.top_k)


def alive_key(rank: int) -> str:
    """The store key that worker `rank` sets once it is there."""
    return f"alive/{rank}"


def wire_layout(config: Config) -> WireLayout:
    return WireLayout(config.scheduler.max_rows, config.scheduler.max_sequences)
