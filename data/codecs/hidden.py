"""Transform coding of hidden states: rotate, round, let zstd be the entropy coder.

    codes = round((h - mean) @ analysis / step)        encode
    h_hat = step * codes @ synthesis + mean            decode, synthesis = analysis^-1

A uniform step in a basis where errors cost the same in every direction is reverse water-filling
(Cover and Thomas, Elements of Information Theory, 10.3.3). Codes are stored plane-major, one
plane per coordinate, so that the entropy coder sees each coordinate's own statistics. The leading
planes, whose codes overflow a byte, are int16.

Shapes: ``N`` positions, ``D`` hidden width, ``W`` wide planes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.errors import UserError
from data.files import write_bytes

INT8_LIMIT = 127
INT16_LIMIT = 32767


@dataclass(frozen=True, slots=True)
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
    wide_planes: int
    """W, leading planes that are stored as int16."""

    def encode(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise hidden states on their own device.

        Returns:
            int16 planes [W, N], int8 planes [D - W, N], and the number of clipped codes (scalar
            tensor). An unclipped code's coordinate error is at most ``step / 2``.
        """
        device = hidden_ND.device
        coordinates = (hidden_ND.float() - self.mean.to(device)) @ self.analysis.to(device)
        codes_DN = (coordinates / self.step).round_().T
        wide, narrow = codes_DN[: self.wide_planes], codes_DN[self.wide_planes :]
        clipped = (wide.abs() > INT16_LIMIT).sum() + (narrow.abs() > INT8_LIMIT).sum()
        return (
            wide.clamp(-INT16_LIMIT, INT16_LIMIT).to(torch.int16).contiguous(),
            narrow.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8).contiguous(),
            clipped,
        )

    def decode(self, wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        """Codes back to hidden states, int16 [W, N] and int8 [D - W, N] -> float32 [N, D]."""
        synthesis = self.step * self.synthesis.to(narrow.device)
        return _decode(wide, narrow, synthesis, self.mean.to(narrow.device))

    def save(self, path: Path) -> None:
        """Write the parameters as safetensors."""
        tensors = {
            "mean": self.mean,
            "analysis": self.analysis.contiguous(),
            "synthesis": self.synthesis.contiguous(),
            # Tensors, since safetensors writes metadata entries in an order that varies.
            "step": torch.tensor([self.step], dtype=torch.float64),
            "wide_planes": torch.tensor([self.wide_planes]),
        }
        write_bytes(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> "HiddenCodec":
        """Read the parameters.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return cls(
                    mean=file.get_tensor("mean"),
                    analysis=file.get_tensor("analysis"),
                    synthesis=file.get_tensor("synthesis"),
                    step=float(file.get_tensor("step")),
                    wide_planes=int(file.get_tensor("wide_planes")),
                )
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cache: {path} must hold the hidden-state codec, got: {error}"
            ) from None


class HiddenDecoder(torch.nn.Module):
    """Decodes the ``hidden_*`` entries of a batch on the batch's device.

    Args:
        codec: The transform codec; None for hidden states stored as float16 or float32.
    """

    synthesis: torch.Tensor
    mean: torch.Tensor

    def __init__(self, codec: HiddenCodec | None = None) -> None:
        super().__init__()
        synthesis = codec.step * codec.synthesis if codec else torch.empty(0)
        self.register_buffer("synthesis", synthesis, persistent=False)
        self.register_buffer("mean", codec.mean if codec else torch.empty(0), persistent=False)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states of the batch's signal positions, float32 [N, D]."""
        if "hidden_raw" in batch:
            return batch["hidden_raw"].float()
        return _decode(batch["hidden_wide"], batch["hidden_narrow"], self.synthesis, self.mean)


def _decode(
    wide: torch.Tensor, narrow: torch.Tensor, synthesis: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    planes = len(wide)
    with torch.autocast(narrow.device.type, enabled=False):
        hidden = narrow.T.float() @ synthesis[planes:]
        hidden += wide.T.float() @ synthesis[:planes]
        return hidden.add_(mean)
