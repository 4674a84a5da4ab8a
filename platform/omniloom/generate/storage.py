"""One thing that a layer caches of each token, for several sequences: as it is, or in int8.

B sequences, S tokens cached of each.
"""

from typing import Self

import torch
from torch import Tensor

INT8_MOST = 127


class Plain:
    """Numbers in one dtype, (slots, capacity, …)."""

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(slots, 0, *shape, dtype=dtype, device=device)

    @property
    def parts(self) -> dict[str, Tensor]:
        """All it is made of."""
        return {"data": self.data}

    @property
    def bytes_per_token(self) -> int:
        """Of one position of one sequence."""
        return sum(part[0, :1].nbytes if part.shape[1] else _bytes_of_one(part) for part in self.parts.values())

    def grow(self, capacity: int) -> None:
        """Make room; what is new is zero, as a masked value must still be a number."""
        for name, part in self.parts.items():
            grown = part.new_zeros(part.shape[0], capacity, *part.shape[2:])
            grown[:, : part.shape[1]] = part
            setattr(self, name, grown)

    def write(self, slot: Tensor | int, at: Tensor | slice, x: Tensor) -> None:
        """Put numbers at positions of slots."""
        self.data[slot, at] = x.to(self.data.dtype)

    def read(self, first: int, last: int, tokens: int) -> Tensor:
        """Of slots first … last − 1 the first `tokens` positions, (B, S, …)."""
        return self.data[first:last, :tokens]

    def move(self, slot: int, kept: Tensor) -> None:
        """Leave these positions of a slot, in this order."""
        for part in self.parts.values():
            part[slot, : len(kept)] = part[slot, kept]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first positions of another."""
        for part in self.parts.values():
            part[target, :tokens] = part[source, :tokens]

    def reorder(self, first: int, sources: Tensor, tokens: int) -> None:
        """Give slots `first`, `first` + 1, … the positions of these slots, all at once."""
        for part in self.parts.values():
            part[first : first + len(sources), :tokens] = part[sources, :tokens]

    def state(self, slot: int, tokens: int) -> dict[str, Tensor]:
        """A slot's positions, to be kept elsewhere."""
        return {name: part[slot, :tokens].clone() for name, part in self.parts.items()}

    def restore(self, slot: int, state: dict[str, Tensor]) -> Self:
        """Take back what `state` gave."""
        for name, part in self.parts.items():
            part[slot, : len(state[name])] = state[name]
        return self


class Int8(Plain):
    """round(x / scale) with scale = max |x| / 127 of each token, float32."""

    def __init__(self, slots: int, shape: tuple[int, ...], read_as: torch.dtype, device: torch.device) -> None:
        super().__init__(slots, shape, torch.int8, device)
        self.read_as, self.scale = read_as, torch.zeros(slots, 0, *(1 for _ in shape), device=device)

    @property
    def parts(self) -> dict[str, Tensor]:
        """All it is made of."""
        return {"data": self.data, "scale": self.scale}

    def write(self, slot: Tensor | int, at: Tensor | slice, x: Tensor) -> None:
        """Quantise, and put numbers at positions of slots."""
        dims = tuple(range(-(self.data.dim() - 2), 0))
        scale = x.float().abs().amax(dim=dims, keepdim=True) / INT8_MOST
        # A token of zeros has a scale of 0.
        self.data[slot, at] = (x.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        self.scale[slot, at] = scale

    def read(self, first: int, last: int, tokens: int) -> Tensor:
        """The numbers again, (B, S, …)."""
        return (self.data[first:last, :tokens] * self.scale[first:last, :tokens]).to(self.read_as)


def _bytes_of_one(part: Tensor) -> int:
    return part.element_size() * part.shape[2:].numel()
