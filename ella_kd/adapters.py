"""Other people's networks, called as ours are: `unet(x, t, context, mask)`."""

from typing import Any

from torch import Tensor, nn


class DiffusersUNet(nn.Module):
    """diffusers' `UNet2DConditionModel` as the inner model of a denoiser.

    x [B, C, h, w]; t [B] fp32, fractional welcome; context [B, L, D]; mask [B, L] bool, True at real tokens, or None.
    Raises ValueError for tokens of the wrong width.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        expected = self.unet.config.cross_attention_dim
        if context.shape[2] != expected:
            raise ValueError(f"the UNet takes tokens of width {expected}, got {context.shape[2]}")
        return self.unet(x, t, encoder_hidden_states=context, encoder_attention_mask=mask).sample
