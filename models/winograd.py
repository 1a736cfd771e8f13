"""3x3 convolutions with a quarter of the multiplications, for networks that run on a CPU.

On a CPU in fp32 a UNet of Stable Diffusion runs at the machine's matrix peak and half of its time is 3x3 convolutions,
so only fewer multiplications make it faster. On a GPU the vendor's kernels do better: this is not for them.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# Lavin and Gray 2015 (arXiv 1509.09308), section 4: per output tile of m x m, the matrices B^T, G and A^T
_TRANSFORMS = {
    2: ([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]]),
    4: ([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
         [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
         [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}
SCRATCH = 8 << 20  # floats of transformed input at a time: beyond, memory is slower than the multiplications saved


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1 in tiles of m x m (Lavin and Gray 2015, arXiv 1509.09308, eq. 12).

    conv: the layer it equals; m: 2 or 4. Of the multiplications 1 / 2.25 (m = 2) or 1 / 4 (m = 4) are left, the weights
    take 1.8 or 4 times the memory. x [B, C_in, h, w] fp32 -> [B, C_out, h, w], in channels_last; the relative error is
    6e-7 or 4e-6, that of the plain layer 3e-7. For inference: the weights are no parameters, and cannot be saved.
    Raises ValueError for a layer of another kind, and for state_dict().
    """

    filters: Tensor  # [(m + 2)^2, C_in, C_out]
    into: Tensor
    out_of: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, m: int) -> None:
        super().__init__()
        if not is_plain_3x3(conv) or m not in _TRANSFORMS:
            raise ValueError(f"Winograd is for 3x3 convolutions with stride 1 and padding 1 and m = 2 or 4, got {conv} "
                             f"and m = {m}")
        self.m, self.around = m, conv.padding_mode == "circular"
        into, of_filter, out_of = (torch.tensor(matrix, dtype=torch.float64) for matrix in _TRANSFORMS[m])
        weight = conv.weight.detach()
        filters = torch.einsum("ai,bj,ocij->abco", of_filter.to(weight), of_filter.to(weight), weight)
        self.register_buffer("filters", filters.flatten(0, 1).contiguous(), persistent=False)
        self.register_buffer("into", torch.kron(into, into).to(weight), persistent=False)
        self.register_buffer("out_of", torch.kron(out_of, out_of).to(weight), persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        m, n = self.m, self.m + 2
        rows, columns = -(-h // m), -(-w // m)
        padded = x.new_zeros(b, rows * m + 2, columns * m + 2, c)
        padded[:, 1:h + 1, 1:w + 1] = x.permute(0, 2, 3, 1)
        if self.around:
            padded[:, 0], padded[:, h + 1] = padded[:, h], padded[:, 1]
            padded[:, :, 0], padded[:, :, w + 1] = padded[:, :, w], padded[:, :, 1]
        tiles = padded.unfold(1, n, m).unfold(2, n, m).permute(4, 5, 0, 1, 2, 3)  # [n, n, b, rows, columns, c]
        row = n * n * columns * c  # floats of transformed input
        done = []
        for some in tiles.split(max(1, SCRATCH // (row * rows)), 2):
            parts = [self._answer(part) for part in some.split(min(rows, max(1, SCRATCH // row)), 3)]
            done.append(_joined(parts, 1))
        image = _joined(done, 0)[:, :h, :w]
        return (image if self.bias is None else image + self.bias).permute(0, 3, 1, 2)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a network with Winograd convolutions has no weights of its own: save the one it was made of")

    def _answer(self, tiles: Tensor) -> Tensor:
        """[n, n, b, rows, columns, C_in] -> [b, rows * m, columns * m, C_out]"""
        m, (n, _, b, rows, columns, c) = self.m, tiles.shape
        seen = (self.into @ tiles.reshape(n * n, -1)).view(n * n, -1, c)
        answer = self.out_of @ (seen @ self.filters).flatten(1)
        return answer.view(m, m, b, rows, columns, -1).permute(2, 3, 0, 4, 1, 5).reshape(b, rows * m, columns * m, -1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def is_plain_3x3(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1)
            and module.padding == (1, 1) and module.dilation == (1, 1) and module.groups == 1)


def tile(conv: nn.Conv2d) -> int:
    """m for a layer. Large layers see small pictures: there reading 4 times the weights costs more than multiplying."""
    return 2 if conv.in_channels * conv.out_channels >= 1280 * 1280 else 4
