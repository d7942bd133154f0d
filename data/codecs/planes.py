"""Packing small integers of known range, several to a byte, into planes of bytes.

An entropy coder of bytes spends at least one bit per byte, but most codes have less information.
So consecutive coordinates share a byte, as digits of a mixed-radix number (Knuth, The Art of
Computer Programming, 4.1), as long as the product of their ranges is at most 256. A coordinate of a
larger range has two digits, a low one of 256 values and a high one.

Shapes: ``D`` coordinates, ``P`` digits, ``G`` byte planes, ``N`` positions.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

BYTE = 256


@dataclass(frozen=True)
class Packing:
    """Layout of codes between ``-limits[d]`` and ``limits[d]``.

    Digits come in this order: the low bytes of wide coordinates (range above 256), the narrow
    coordinates, the high digits of wide coordinates; each by coordinate. Planes are filled
    greedily in that order, the first digit of a plane being the most significant.
    """

    limits: tuple[int, ...]
    """Largest absolute code per coordinate, each at most 32,767."""

    @cached_property
    def digits(self) -> list[tuple[int, int, int]]:
        """Per digit [P]: coordinate, range, and the value of one unit in codes (1 or 256)."""
        spans = [2 * limit + 1 for limit in self.limits]
        wide = [d for d, span in enumerate(spans) if span > BYTE]
        narrow = [(d, span, 1) for d, span in enumerate(spans) if span <= BYTE]
        high = [(d, (spans[d] - 1) // BYTE + 1, BYTE) for d in wide]
        return [*((d, BYTE, 1) for d in wide), *narrow, *high]

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Per digit [P]: its plane, and its weight in the plane's byte."""
        groups: list[list[int]] = []
        size = BYTE + 1
        for _, span, _ in self.digits:
            if size * span > BYTE:
                groups.append([])
                size = 1
            groups[-1].append(span)
            size *= span
        return [
            (plane, math.prod(group[i + 1 :]))
            for plane, group in enumerate(groups)
            for i in range(len(group))
        ]

    @property
    def planes(self) -> int:
        """Number of byte planes G."""
        return self.places[-1][0] + 1 if self.places else 0

    def table(self, device: torch.device) -> "PackingTable":
        """The layout as tensors on a device, made once, since the copies would stall the device."""
        if device not in self._tables:
            self._tables[device] = self._table(device)
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, "PackingTable"]:
        return {}

    def _table(self, device: torch.device) -> "PackingTable":
        coordinate, span, worth = torch.tensor(self.digits, dtype=torch.int32, device=device).T
        plane, weight = torch.tensor(self.places, dtype=torch.int32, device=device).T
        bytes_P256 = torch.arange(BYTE, dtype=torch.int32, device=device).expand(len(span), BYTE)
        digit_P256 = torch.div(bytes_P256, weight[:, None], rounding_mode="floor") % span[:, None]
        return PackingTable(
            coordinate=coordinate.contiguous(),
            plane=plane.contiguous(),
            weight=weight[:, None].contiguous(),
            span=span[:, None].contiguous(),
            worth=worth[:, None].contiguous(),
            value=digit_P256 * worth[:, None],
            limit=torch.tensor(self.limits, dtype=torch.int32, device=device)[:, None],
            planes=self.planes,
        )


@dataclass(frozen=True, slots=True)
class PackingTable:
    """Digits of a :class:`Packing` as int32 columns, [P] or [P, 1]; limits [D, 1]."""

    coordinate: torch.Tensor
    plane: torch.Tensor
    weight: torch.Tensor
    span: torch.Tensor
    worth: torch.Tensor
    value: torch.Tensor
    """Value of each byte in each digit, in codes, [P, 256]."""
    limit: torch.Tensor
    planes: int

    def pack(self, codes_DN: torch.Tensor) -> torch.Tensor:
        """Codes within their limits, int32 [D, N], to bytes, uint8 [G, N]."""
        shifted = codes_DN + self.limit
        digits_PN = shifted.index_select(0, self.coordinate)
        digits_PN = digits_PN.div_(self.worth, rounding_mode="floor").remainder_(self.span)
        packed = torch.zeros(
            self.planes, codes_DN.shape[1], dtype=torch.int32, device=codes_DN.device
        )
        return packed.index_add_(0, self.plane, digits_PN.mul_(self.weight)).to(torch.uint8)

    def unpack(self, packed_GN: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`pack`, int32 [D, N]; accepts any bytes."""
        # By a table: integer division is six times slower on a CPU (measured).
        digits_PN = self.value.gather(1, packed_GN.index_select(0, self.plane).long())
        codes = torch.zeros(
            len(self.limit), packed_GN.shape[1], dtype=torch.int32, device=packed_GN.device
        )
        return codes.index_add_(0, self.coordinate, digits_PN).sub_(self.limit)
