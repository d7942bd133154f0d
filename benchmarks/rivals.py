"""Other ways to code a hidden state, to compare the chosen one with.

None of these is part of the product. Shapes: ``N`` positions, ``D`` hidden width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from torch import Tensor

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.frames import encode_block
from distilcache.data.codecs.hidden import HiddenCodec, HiddenDecoder
from distilcache.stages.teacher_cache.calibrate import calibrate

GRID = 200_001
"""Points of the normal density that Lloyd-Max levels are fitted to."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A codec as its effect and its price."""

    name: str
    bytes_per_position: float
    round_trip: Callable[[Tensor], Tensor]


def lloyd_max(bits: int) -> Tensor:
    """Levels of the optimal fixed-rate quantiser of N(0, 1) (Lloyd 1982; Max 1960)."""
    x = torch.linspace(-6, 6, GRID, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    levels: Tensor = torch.special.ndtri(
        (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    )
    for _ in range(500):
        cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, cell, density)
        levels = torch.zeros_like(levels).index_add_(0, cell, density * x) / mass
    return levels.float()


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Each value replaced by the nearest level."""
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def rotated(calibration_ND: Tensor, bits: int) -> Rival:
    """Random rotation, then the same scalar quantiser for every coordinate.

    The rotation makes coordinates near normal with a common variance; the norm of each centred
    state is kept beside in 2 bytes.
    """
    width = calibration_ND.shape[1]
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    mean, levels = calibration_ND.mean(0), lloyd_max(bits)

    def round_trip(hidden_ND: Tensor) -> Tensor:
        centred = hidden_ND - mean
        scale = centred.norm(dim=-1, keepdim=True).half().float() / width**0.5
        decoded_ND: Tensor = nearest(centred @ rotation / scale, levels) * scale
        return torch.addmm(mean, decoded_ND, rotation.T)

    return Rival(f"rotation + {bits}-bit Lloyd-Max", width * bits / 8 + 2, round_trip)


def greedy(codec: HiddenCodec, calibration_ND: Tensor, bytes_per_position: float) -> Rival:
    """The codec's own basis with a fixed number of bits per coordinate instead of one step.

    Bits go one by one to the coordinate whose squared error falls the most (Gersho and Gray,
    Vector Quantization and Signal Compression, 8.4), each with a Lloyd-Max quantiser of its own
    spread.
    """
    coordinates = (calibration_ND - codec.mean) @ codec.analysis
    spread = coordinates.std(0)
    tables = {bits: lloyd_max(bits) for bits in range(1, 9)}
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    error = torch.tensor(
        [1.0, *(float((x - nearest(x, t)).pow(2).mean()) for t in tables.values())]
    )
    bits = torch.zeros(len(spread), dtype=torch.int64)
    for _ in range(int(bytes_per_position * 8)):
        gain = spread**2 * (error[bits] - error[(bits + 1).clamp(max=8)])
        bits[gain.argmax()] += 1

    def round_trip(hidden_ND: Tensor) -> Tensor:
        scaled = (hidden_ND - codec.mean) @ codec.analysis / spread
        decoded = torch.zeros_like(scaled)
        for count, levels in tables.items():
            chosen = bits == count
            decoded[:, chosen] = nearest(scaled[:, chosen].contiguous(), levels)
        return torch.addmm(codec.mean, decoded * spread, codec.synthesis)

    return Rival("sensitivity basis + greedy bits", float(bits.sum()) / 8, round_trip)


def _round_trip(codec: HiddenCodec) -> Callable[[Tensor], Tensor]:
    return lambda hidden_ND: codec.decode(codec.encode(hidden_ND)[0])


def coded(name: str, codec: HiddenCodec, hidden_ND: Tensor) -> Rival:
    """A transform codec of this project as it would be stored."""
    planes, _ = codec.encode(hidden_ND)
    frame = encode_block({"codes": planes.numpy()}, {}, {"codes": len(hidden_ND)})
    return Rival(name, len(frame) / len(hidden_ND), _round_trip(codec))


def without_packing(codec: HiddenCodec, hidden_ND: Tensor, name: str) -> list[Rival]:
    """The same codes, one to a byte (two where they need it) with zstd; and at their entropy.

    The second is what a perfect memoryless entropy coder with free tables would take.
    """
    planes, _ = codec.encode(hidden_ND)
    codes = codec.packing.table(planes.device).unpack(planes).numpy()
    narrow = np.abs(codes).max(1) <= 127
    raw = codes[~narrow].astype(np.int16).tobytes() + codes[narrow].astype(np.int8).tobytes()
    plain = len(zstandard.ZstdCompressor(level=1).compress(raw)) / len(hidden_ND)
    bits = sum(_entropy(plane) for plane in codes)
    return [
        Rival(f"{name}, one code per byte, zstd", plain, _round_trip(codec)),
        Rival(f"{name}, ideal entropy coder", bits / 8, _round_trip(codec)),
    ]


def _entropy(plane: np.ndarray) -> float:
    counts = np.unique(plane, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


class Rivalled(HiddenDecoder):
    """The exact hidden states of a cache after another codec's round trip."""

    def __init__(self, live: Cache, rival: Rival) -> None:
        super().__init__("rival")
        self.exact = live.teacher.hidden_decoder()
        self.rival = rival

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decoded hidden states [H, D]."""
        return self.rival.round_trip(self.exact(batch))


def rivals(fitted: Cache, chosen: Cache) -> list[Rival]:
    """Other codecs, fitted to a block of the text that the chosen one was fitted to.

    Args:
        fitted: Exact hidden states of that text.
        chosen: A cache with the chosen codec.
    """
    block = fitted.read_block(0)
    hidden_ND = torch.tensor(block[fitted.encoding.hidden[0].column])
    hidden_ND = hidden_ND.reshape(-1, fitted.encoding.hidden[0].width)
    codec, head = chosen.teacher.hidden_codec(-1), fitted.teacher.lm_head()
    plain, ideal = without_packing(codec, hidden_ND, "coded 1e-3")
    klt = calibrate(hidden_ND, head, (2.0,), 1e-3, cosine_weight=1e6)
    heavy = calibrate(hidden_ND, head, (2.0,), 1e-3, cosine_weight=0.3)
    return [
        *(rotated(hidden_ND, bits) for bits in (3, 4)),
        greedy(codec, hidden_ND, ideal.bytes_per_position),
        coded("KLT basis, 1e-3", klt, hidden_ND),
        coded("w = 0.3, 1e-3", heavy, hidden_ND),
        replace(plain, name=plain.name + ", no replay bias"),
        ideal,
    ]
