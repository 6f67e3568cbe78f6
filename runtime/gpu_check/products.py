"""Which bits a matrix product gives: whether they depend on a row's place among the rows, and on how many there are.

The first decides whether steps of one fixed shape give the same bits with lookahead and without; the second, whether
they need one."""

from __future__ import annotations

from functools import partial

import torch

from runtime.gpu_check.models import SHAPES, TINY
from runtime.gpu_check.setting import Report, Setting
from runtime.model.cuda.choice import same_at_any_place

COUNTS = (1, 2, 8, 16, 32, 64, 128, 256)
SHORT = (1, 16, 64)


def check(setting: Setting) -> Report:
    """Per weight shape and number of rows M: is row i the same at any place; is it that of M = 64."""
    spec = TINY if setting.is_tiny else SHAPES["8B"]
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    shapes = {
        "qkv": (heads, spec.hidden_size),
        "output": (spec.hidden_size, spec.num_heads * spec.head_dim),
        "gate and up": (2 * spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
        "LM head": (spec.vocab_size, spec.hidden_size),
    }
    found: Report = {"shapes": {}}
    any_place, any_count = True, True
    for name, (rows, columns) in shapes.items():
        weight = torch.randn(rows, columns, device=setting.device).mul_(columns**-0.5).to(setting.dtype)
        rest = torch.randn(max(COUNTS), columns, device=setting.device).to(setting.dtype)
        cells = {count: cell(weight, rest, count) for count in (SHORT if setting.is_short else COUNTS)}
        found["shapes"][name] = {
            str(count): {"any_place": place, "as_64": as_64} for count, (place, as_64) in cells.items()
        }
        moved = [count for count, (place, _) in cells.items() if not place]
        unlike = [count for count, (_, as_64) in cells.items() if not as_64]
        any_place, any_count = any_place and not moved, any_count and not unlike
        places = "same at every place" if not moved else f"place matters, M = {', '.join(map(str, moved))}"
        counts = "same at every M" if not unlike else f"unlike M = 64: {', '.join(map(str, unlike))}"
        setting.row(f"{name} [{rows}, {columns}]", places, counts)
        del weight, rest
    found |= {"any_place": any_place, "any_count": any_count, "ok": any_place or not setting.on_gpu}
    found["summary"] = f"place among the rows {'changes no bit' if any_place else 'CHANGES bits'}, "
    found["summary"] += f"their number {'none, either' if any_count else 'does'}"
    verdict = "holds by one row shape" if any_place else "needs kernels of its own"
    setting.row("deterministic decoding", verdict, "no shape needed" if any_place and any_count else "")
    return found


def cell(weight: torch.Tensor, rest: torch.Tensor, count: int) -> tuple[bool, bool]:
    """Whether every row gives the same bits at any place among `count`, and whether they are those among 64."""
    product = partial(torch.nn.functional.linear, weight=weight)
    found = product(rest[:count])
    as_64 = torch.equal(product(rest[:64])[: min(count, 64)], found[:64])
    return same_at_any_place(product, rest[:count]), as_64
