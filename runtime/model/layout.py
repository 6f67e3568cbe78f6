"""Where the tensors that the decoder asks for stand in a family's checkpoints.

The decoder calls them as Llama's checkpoints do. A family has other names for some, and may have several in one: one
behind the other, or head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
ROOT = "model"


@dataclass(frozen=True)
class Slot:
    """Rows of a tensor within one of the file's: blocks of `length` rows, each `stride` further on."""

    name: str
    num_rows: int
    first: int
    length: int
    stride: int

    @property
    def is_whole(self) -> bool:
        return self.length == self.stride

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The file's rows [start, stop) that hold these rows of ours, in order."""
        found = []
        while start < stop:
            block, place = divmod(start, self.length)
            count = min(self.length - place, stop - start)
            first = self.first + block * self.stride + place
            found.append((first, first + count))
            start += count
        return found


@dataclass(frozen=True)
class Layout:
    root: str = ROOT
    """The module that is the decoder without its head."""
    names: tuple[tuple[str, str], ...] = ()
    """(our name of a module, its name in the file). What shares a name is one tensor there, in the order of ours."""
    by_head: bool = False
    """In such a tensor, the rows of a head of each of ours stand together; else ours stand one behind the other."""
    left_over: str = ""
    """A pattern of names that checkpoints may have besides, which follow from the config."""

    def name(self, ours: str) -> str:
        """The name in the file of one of our tensors."""
        module, _, kind = ours.rpartition(".")
        for name, other in self.names:
            if module == name or module.endswith(f".{name}"):
                module = module.removesuffix(name) + other
                break
        if module.startswith(f"{ROOT}."):
            module = self.root + module.removeprefix(ROOT)
        return f"{module}.{kind}"

    def slots(self, shapes: Mapping[str, Shape], head_dim: int) -> dict[str, Slot]:
        """By our name; `shapes` are those of our tensors."""
        found = {}
        for name, members in self._members(shapes).items():
            total = sum(shapes[member][0] for member in members)
            first = 0
            for index, member in enumerate(members):
                count = shapes[member][0]
                if self.by_head and len(members) > 1:
                    found[member] = Slot(name, count, index * head_dim, head_dim, head_dim * len(members))
                else:
                    found[member] = Slot(name, count, first, count, total)
                first += count
        return found

    def file_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The file's tensors; `shapes` are those of ours."""
        return {
            name: (sum(shapes[member][0] for member in members), *shapes[members[0]][1:])
            for name, members in self._members(shapes).items()
        }

    def _members(self, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
        members: dict[str, list[str]] = {}
        for ours in shapes:
            members.setdefault(self.name(ours), []).append(ours)
        return members


LLAMA = Layout()
PHI3 = Layout(
    names=(
        *((f"self_attn.{part}_proj", "self_attn.qkv_proj") for part in "qkv"),
        *((f"mlp.{part}_proj", "mlp.gate_up_proj") for part in ("gate", "up")),
    )
)
GPT_NEOX = Layout(
    root="gpt_neox",
    names=(
        *((f"self_attn.{part}_proj", "attention.query_key_value") for part in "qkv"),
        ("self_attn.o_proj", "attention.dense"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ("embed_tokens", "embed_in"),
        ("model.norm", "model.final_layer_norm"),
        ("lm_head", "embed_out"),
    ),
    by_head=True,
    left_over=r"(.*\.)?attention\.(bias|masked_bias)",  # the causal mask, which early checkpoints have
)
