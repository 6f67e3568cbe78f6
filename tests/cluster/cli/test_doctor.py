"""What `outrider doctor` would try on a GPU, tried on a CPU: the same steps in the same fixed shapes."""

from __future__ import annotations

import re

import pytest
import torch

from cluster.cli import doctor
from runtime.mesh.mesh import Mesh
from runtime.model.cuda.graphs import FixedView, GraphedDecoder
from runtime.model.decoder import Decoder
from runtime.model.directory import load_spec
from runtime.model.loader import load_decoder


@pytest.fixture(scope="module")
def decoder(tiny_model) -> Decoder:
    found = load_decoder(tiny_model, load_spec(tiny_model), Mesh(), torch.float32, kernels="torch")
    assert isinstance(found, Decoder)
    return found


def test_graphs_are_compared_with_steps_without(decoder) -> None:
    assert doctor.compare_graphs(decoder).startswith("32 of 32 tokens as without graphs, logits within ")


@pytest.mark.parametrize("fault", ["mask", "nan"])
def test_graphs_that_compute_something_else_fail(decoder, monkeypatch, fault) -> None:
    if fault == "mask":
        monkeypatch.setattr(FixedView, "mask", lambda self, window: torch.zeros(self.sees.shape[1:]))
    else:
        monkeypatch.setattr(GraphedDecoder, "logits", lambda self, hidden: self.decoder.logits(hidden * torch.nan))
    with pytest.raises(RuntimeError, match="logits differ by .* rows"):
        doctor.compare_graphs(decoder)


def test_times_of_plain_and_wide_steps(decoder) -> None:
    words = r"float32: a plain step [\d.]+ ms, with graphs [\d.]+; 64 rows [\d.]+ ms, with graphs [\d.]+"
    assert re.fullmatch(words, doctor.time_graphs(decoder, rounds=1))


@pytest.mark.system
def test_processes_add_up_a_tensor() -> None:
    assert doctor._all_reduce("gloo").startswith("2 processes agree")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("check", [lambda: doctor._on_cuda("float32"), lambda: doctor._all_reduce("nccl")])
def test_without_a_gpu_its_checks_are_left_out(check) -> None:
    finding = doctor._finding("", check, "")
    assert finding.status == "not available" and finding.detail
