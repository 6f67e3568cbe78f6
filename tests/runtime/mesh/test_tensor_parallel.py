"""Every variant, split over 2, 3, 4 and 8 gloo processes, gives Hugging Face's logits."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch

from runtime.model.directory import load_spec
from tests.zoo import TRAINED, VARIANTS, make_model, run_tensor_parallel, some_tokens

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory per variant: the checkpoint, and what Hugging Face makes of some tokens."""
    directory = tmp_path_factory.mktemp("zoo")
    tokens = some_tokens(TRAINED + 20)
    for variant in VARIANTS:
        place = directory / variant
        model = make_model(variant)
        model.save_pretrained(place)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0].numpy()
        (place / "reference.pkl").write_bytes(pickle.dumps((load_spec(place), tokens, expected)))
    return directory


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_logits_equal_hugging_face(checkpoints: Path, tp: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once for all ranks
    ranks = [context.Process(target=run_tensor_parallel, args=(rank, tp, checkpoints)) for rank in range(tp)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=120)
        assert [process.exitcode for process in ranks] == [0] * tp
    finally:
        for process in ranks:
            process.kill()
            process.join()
    found = [pickle.loads((checkpoints / f"found-{tp}-{rank}.pkl").read_bytes()) for rank in range(tp)]
    for variant in VARIANTS:
        ranges, heads, differences = zip(*(rank[variant] for rank in found), strict=True)
        assert [stop for _, stop in ranges] == [*(start for start, _ in ranges[1:]), 101] and ranges[0][0] == 0
        assert sum(share.query_stop - share.query_start for share in heads) in (8, 9)
        assert max(differences) < 1e-4, variant
