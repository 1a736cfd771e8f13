"""What SDXL is told of a picture beside its text: sizes and a score, each number a sinusoid behind the pooled text."""

import torch
from torch import Tensor

from ella_kd.models.context import Context
from ella_kd.models.timestep import timestep_embedding

WIDTH = 256  # of one number's sinusoid
PIXELS = 8  # per latent, along one side
POSITIVE_SCORE = 6.0  # the refiner's aesthetic score, where nobody says
NEGATIVE_SCORE = 2.5  # and the one that its negative prompts are given
NEEDED = {"vector": "a vector [B, D] (SDXL: the pooled text)", "guidance": "a guidance scale [B] (LCM)",
          "label": "a label [B], int64 (the x4 upscaler: how noisy the picture beside x is)"}


def added_vector(context: Context, x: Tensor, width: int) -> Tensor:
    """What the network's label_emb takes, [B, width]: the context's vector, then the numbers that it has room for.

    x [B, C, h, w]: the latents, whose size is told where the context has no sizes. Raises ValueError for a vector of
    another width, and for sizes or a score without a place.
    """
    vector = context.vector
    assert vector is not None
    count = count_told(vector, x, width)
    if not count:
        refuse("a whole vector has no place for", {"sizes": context.sizes, "score": context.score})
        return vector
    numbers = told_numbers(context, x, count)
    return torch.cat([vector, timestep_embedding(numbers.flatten(), WIDTH).view(len(x), -1).to(vector.dtype)], 1)


def count_told(vector: Tensor, x: Tensor, width: int) -> int:
    """How many numbers follow a vector: 6 (SDXL), 5 (its refiner) or none. Raises ValueError for another width."""
    count, rest = divmod(width - vector.shape[-1], WIDTH)
    if vector.ndim != 2 or len(vector) != len(x) or rest or count not in (0, 5, 6):
        raise ValueError(f"the UNet takes an added vector [{len(x)}, D] with D = {width - 6 * WIDTH} (SDXL's pooled "
                         f"text), {width - 5 * WIDTH} (the refiner's) or {width} (whole), got {list(vector.shape)}")
    return count


def told_numbers(context: Context, x: Tensor, count: int) -> Tensor:
    """[B, count] fp32. 6, SDXL: original height and width, crop top and left, target height and width; 5, its refiner:
    the first four and the aesthetic score. By default the picture is not cropped, its size that of the latents x."""
    def same(number: float) -> Tensor:  # made on the device: nothing is copied there
        return torch.full((len(x),), number, dtype=torch.float32, device=x.device)

    sizes, score = context.sizes, context.score
    if sizes is None:
        height, width = (same(PIXELS * side) for side in x.shape[2:])
        sizes = torch.stack([height, width, same(0), same(0), height, width], 1)
    if sizes.shape != (len(x), 6):
        raise ValueError(f"sizes must be [{len(x)}, 6], original height and width, crop top and left, target height "
                         f"and width, got {list(sizes.shape)}")
    if count == 6:
        refuse("SDXL's base model has no place for", {"score": score})
        return sizes.float()
    if score is not None and score.shape != x.shape[:1]:
        raise ValueError(f"score must be [{len(x)}], one per sample, got {list(score.shape)}")
    return torch.cat([sizes.float()[:, :4], (same(POSITIVE_SCORE) if score is None else score.float())[:, None]], 1)


def refuse(who: str, inputs: dict[str, Tensor | None]) -> None:
    """Raises ValueError naming the inputs that there are."""
    given = [name for name, x in inputs.items() if x is not None]
    if given:
        raise ValueError(f"{who} {' and '.join(given)}: leave {'it' if len(given) == 1 else 'them'} out")
