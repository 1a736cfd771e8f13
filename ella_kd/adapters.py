"""Other people's networks, called as ours are: `unet(x, t, context, mask)`."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ella_kd.models.attention import check_mask, log_weights


class DiffusersUNet(nn.Module):
    """diffusers' `UNet2DConditionModel` as the inner model of a denoiser.

    x [B, C, h, w]; t [B] fp32, fractional welcome; context [B, L, D]; mask [B, L] bool, True at real tokens, or floats
    >= 0, the factor by which a token's attention is multiplied, or None. Raises ValueError for tokens of the wrong
    width, or a mask that does not fit them.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        expected = self.unet.config.cross_attention_dim
        if context.shape[2] != expected:
            raise ValueError(f"the UNet takes tokens of width {expected}, got {context.shape[2]}")
        check_mask(mask, context)
        seen = mask if mask is None or mask.dtype == torch.bool else _Bias(log_weights(mask, torch.float32))
        return self.unet(x, t, encoder_hidden_states=context, encoder_attention_mask=seen).sample


class _Bias:
    """The attention bias, in place of a mask m that diffusers turns into the bias `(1 - m.to(dtype)) * -10000`.

    Sent through that formula as a number, log w = (1 - m) * -10000 would come out in steps of 4.9 in fp16 and 39 in
    bf16 (m sits beside 1), and wrong by 6e-4 in fp32. Any other use of m is a TypeError, not a wrong picture.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def to(self, *args: Any, **kwargs: Any) -> "_Bias":
        return _Bias(self.bias.to(*args, **kwargs))

    def __rsub__(self, one: int) -> "_Bias":
        return self if one == 1 else self._refuse()

    def __mul__(self, factor: float) -> Tensor:
        return self.bias if factor == -10000 else self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError("this diffusers does not turn a mask m into a bias (1 - m) * -10000: weights cannot pass")
