"""diffusers' networks as ours: `models.network.Network`."""

from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ella_kd.models.added import NEEDED, count_told, told_numbers
from ella_kd.models.attention import check_mask, log_weights
from ella_kd.models.context import Context
from ella_kd.models.network import Levels, Patches, refuse_inputs, refuse_patches
from ella_kd.models.timestep import guidance_embedding


class DiffusersUNet(nn.Module):
    """diffusers' `UNet2DConditionModel` as the inner model of a denoiser: a `models.network.Network`.

    x [B, C, h, w]; t [B] fp32, fractional welcome; context: tokens [B, L, D], a mask bool or of weights, channels, and
    what the UNet's config says that it is told: vector, sizes and score (SDXL), label, guidance; or bare tokens.
    Raises ValueError for tokens of the wrong width, a mask that does not fit them, an input that is missing or that it
    does not see, and patches, for which it has no place.
    """

    places: tuple[str, ...] = ()

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    @property
    def in_channels(self) -> int:
        return int(self.unet.config.in_channels)

    @property
    def out_channels(self) -> int:
        return int(self.unet.config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def vector_dim(self) -> int | None:
        """Of SDXL's added vector, sizes included; None for a network without."""
        config = self.unet.config
        return config.projection_class_embeddings_input_dim if config.addition_embed_type == "text_time" else None

    @property
    def guidance_dim(self) -> int | None:
        """Of what a guidance scale is told by (LCM); None for a network that is not told it."""
        return self.unet.config.time_cond_proj_dim

    def at(self, levels: Levels) -> Self:
        """Itself: it is the same at every noise level."""
        return self

    def forward(self, x: Tensor, t: Tensor, context: Context | Tensor, patches: Patches = ()) -> Tensor:
        seen = Context.of(context)
        expected = self.unet.config.cross_attention_dim
        if seen.tokens.shape[2] != expected:
            raise ValueError(f"the UNet takes tokens of width {expected}, got {seen.tokens.shape[2]}")
        refuse_patches(patches, self.unet)
        mask = seen.mask
        check_mask(mask, seen.tokens)
        bias = mask if mask is None or mask.dtype == torch.bool else _Bias(log_weights(mask, torch.float32))
        return self.unet(seen.beside_x(x), t, encoder_hidden_states=seen.tokens, encoder_attention_mask=bias,
                         **self._told(seen, x)).sample

    def _told(self, seen: Context, x: Tensor) -> dict[str, Any]:
        """diffusers' arguments for what is seen beside tokens."""
        told: dict[str, Any] = {}
        known = {"channels": True, "label": bool(self.unet.config.num_class_embeds),
                 "guidance": self.guidance_dim is not None}
        known |= dict.fromkeys(("vector", "sizes", "score"), self.vector_dim is not None)
        refuse_inputs(seen, [name for name, is_known in known.items() if is_known], self.unet)
        for name in ("vector", "label", "guidance"):
            if known[name] and getattr(seen, name) is None:
                raise ValueError(f"this UNet needs {NEEDED[name]}: give it beside the tokens, With(cond, {name}=...)")
        if seen.vector is not None and self.vector_dim is not None:
            count = count_told(seen.vector, x, self.vector_dim)
            if not count:
                raise ValueError("diffusers' UNet takes SDXL's vector in parts: the pooled text alone, and sizes")
            told["added_cond_kwargs"] = {"text_embeds": seen.vector, "time_ids": told_numbers(seen, x, count)}
        if seen.guidance is not None and self.guidance_dim is not None:
            told["timestep_cond"] = guidance_embedding(seen.guidance, self.guidance_dim).to(self.dtype)
        return told if seen.label is None else {**told, "class_labels": seen.label}


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
