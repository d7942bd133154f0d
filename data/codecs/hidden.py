"""Transform coding of hidden states: rotate, round, pack; zstd is the entropy coder.

    codes = round((h - mean) @ analysis / step)        encode
    h_hat = step * codes @ synthesis + mean            decode, synthesis = analysis^-1

Codes of a layer's relations (``relations.py``) go further in four ways. What the token's word
embedding predicts is taken off first. Coordinates are rounded towards 0, which saves more bytes
than it costs. Each coordinate's values other than 0 are decoded to where they lie on average. And
students read the decoded coordinates times a gain, which makes up for what rounding took off.

A uniform step, in a basis in which errors cost the same in every direction, is reverse
water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3). Codes are stored in
planes, so that the entropy coder sees the statistics of each coordinate; several small codes share
a byte (see ``distilcache.data.codecs.planes``).

Shapes: ``N`` positions, ``D`` hidden width, ``G`` byte planes, ``V`` vocabulary, ``E`` width of
the word embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from distilcache.data.codecs.planes import Packing
from distilcache.data.errors import UserError
from distilcache.data.storage.files import write_bytes

LIMIT_MAX = 32767
"""Largest code: two digits are enough for it."""


@dataclass(frozen=True)
class HiddenCodec:
    """Parameters of the transform codec of one layer; float32 throughout."""

    mean: torch.Tensor
    """[D]"""
    analysis: torch.Tensor
    """[D, D], hidden state to coordinates, columns in order of falling variance."""
    synthesis: torch.Tensor
    """[D, D], inverse of ``analysis``."""
    step: float
    """Width of a quantisation cell in coordinate units."""
    limits: tuple[int, ...]
    """Largest absolute code per coordinate, [D]; larger codes are clipped and counted."""
    replay_bias: torch.Tensor | None = None
    """[temperatures, V], added to the replayed logits at each of ``temperatures``."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of ``replay_bias``."""
    prediction: torch.Tensor | None = None
    """[E, D]: the word embedding times it is taken off before coding."""
    dead_zone: float = 0.0
    """Codes are ``floor(|x| + 1/2 - dead_zone)`` with the sign of x."""
    offsets: torch.Tensor | None = None
    """[D], added to the magnitude of codes other than 0 when they are decoded."""
    gains: torch.Tensor | None = None
    """[D], factors of the decoded coordinates in training: right on average, but further away."""

    @cached_property
    def packing(self) -> Packing:
        """Place of each code in the byte planes."""
        return Packing(self.limits)

    def encode(
        self, hidden_ND: torch.Tensor, embedded_NE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise hidden states on their own device.

        Args:
            hidden_ND: Hidden states.
            embedded_NE: Word embedding of each position's token, where the codec predicts from it.

        Returns:
            uint8 planes [G, N], and the number of clipped codes (scalar tensor). An unclipped
            code's coordinate error is at most ``step / 2``.
        """
        device = hidden_ND.device
        left = hidden_ND.float() - self.predicted(embedded_NE)
        coordinates = (left - self.mean.to(device)) @ self.analysis.to(device)
        codes_DN = self.rounded(coordinates / self.step).T
        table = self.packing.table(device)
        limit = table.limit.float()
        clipped = (codes_DN.abs() > limit).sum()
        codes_DN = torch.maximum(torch.minimum(codes_DN, limit), -limit)
        return table.pack(codes_DN.to(torch.int32)), clipped

    def decode(
        self, planes_GN: torch.Tensor, embedded_NE: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Byte planes back to the nearest hidden states, uint8 [G, N] -> float32 [N, D]."""
        device = planes_GN.device
        synthesis = self.step * self.synthesis.to(device)
        values_ND = self.packing.table(device).unpack(planes_GN).T.float()
        if self.offsets is not None:
            values_ND += values_ND.sign() * self.offsets.to(device)
        return values_ND @ synthesis + self.mean.to(device) + self.predicted(embedded_NE)

    def rounded(self, scaled_ND: torch.Tensor) -> torch.Tensor:
        """Coordinates in units of the step as codes, in place."""
        if self.dead_zone == 0:
            return scaled_ND.round_()
        sizes_ND = scaled_ND.abs().add_(0.5 - self.dead_zone).floor_().clamp_min_(0)
        return scaled_ND.sign_().mul_(sizes_ND)

    def predicted(self, embedded_NE: torch.Tensor | None) -> torch.Tensor | float:
        """What the word embeddings predict of the hidden states, [N, D]; 0 where they do not."""
        if self.prediction is None:
            return 0.0
        assert embedded_NE is not None, "the codec predicts from the tokens"
        return embedded_NE.float() @ self.prediction.to(embedded_NE.device)

    def bias_at(self, temperature: float) -> torch.Tensor | None:
        """Row of ``replay_bias`` [V] for a temperature; None: none was calibrated."""
        if self.replay_bias is None or temperature not in self.temperatures:
            return None
        return self.replay_bias[self.temperatures.index(temperature)]

    def save(self, path: Path) -> None:
        """Write the parameters as safetensors."""
        tensors = {
            "mean": self.mean,
            "analysis": self.analysis.contiguous(),
            "synthesis": self.synthesis.contiguous(),
            # As tensors, since safetensors writes metadata in varying order.
            "step": torch.tensor([self.step], dtype=torch.float64),
            "limits": torch.tensor(self.limits, dtype=torch.int32),
        }
        if self.replay_bias is not None:
            tensors["replay_bias"] = self.replay_bias.contiguous()
            tensors["temperatures"] = torch.tensor(self.temperatures, dtype=torch.float64)
        if self.prediction is not None and self.offsets is not None:
            tensors["prediction"] = self.prediction.contiguous()
            tensors["offsets"] = self.offsets
            tensors["dead_zone"] = torch.tensor([self.dead_zone], dtype=torch.float64)
        if self.gains is not None:
            tensors["gains"] = self.gains
        write_bytes(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> "HiddenCodec":
        """Read the parameters.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                mean=tensors["mean"],
                analysis=tensors["analysis"],
                synthesis=tensors["synthesis"],
                step=float(tensors["step"]),
                limits=tuple(tensors["limits"].tolist()),
                replay_bias=tensors.get("replay_bias"),
                temperatures=tuple(tensors.get("temperatures", torch.empty(0)).tolist()),
                prediction=tensors.get("prediction"),
                dead_zone=float(tensors.get("dead_zone", 0.0)),
                offsets=tensors.get("offsets"),
                gains=tensors.get("gains"),
            )
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cache: {path} must hold the hidden-state codec, got: {error}"
            ) from None


def with_signs(basis: torch.Tensor) -> torch.Tensor:
    """Make each eigenvector's largest entry positive: its sign is otherwise arbitrary."""
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()


class HiddenDecoder(torch.nn.Module):
    """Decodes the hidden states of one layer on the batch's device, for training.

    Args:
        name: Key of the batch: ``hidden_<l>``.
        codec: The transform codec; None for hidden states stored as float16 or float32.
    """

    synthesis: torch.Tensor
    mean: torch.Tensor

    def __init__(self, name: str, codec: HiddenCodec | None = None) -> None:
        super().__init__()
        self.name = name
        self.codec = codec
        synthesis = codec.step * codec.synthesis if codec else torch.empty(0)
        if codec and codec.gains is not None:
            synthesis = codec.gains[:, None] * synthesis
        self.register_buffer("synthesis", synthesis, persistent=False)
        self.register_buffer("mean", codec.mean if codec else torch.empty(0), persistent=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states of the batch's hidden-state positions, float32 [H, D].

        The product runs in the type of autocast. In bfloat16 codes up to 256 are exact.
        """
        stored = batch[self.name]
        if self.codec is None:
            return stored.float()
        codes_DN = self.codec.packing.table(stored.device).unpack(stored)
        return torch.mm(codes_DN.T.float(), self.synthesis).float() + self.mean
