"""Conditionings: functions of the timestep that give the UNet its tokens, and the ways to combine them.

`conditioning(t) -> Context`. A plain prompt is a constant function, an ELLA prompt asks its connector at every t, and
conditionings combine into new ones: `Concat`, `Stack`, `Lerp`, `Switch`, `window`, `With` combine tokens; `And` and
`Regions` combine what the network answers. They are values: nothing here changes an object after it was made.
"""

from ella_kd.conditioning.base import Combination, Conditioning, levels_of
from ella_kd.conditioning.combine import Channels, Concat, Lerp, Stack, With, lerp_features
from ella_kd.conditioning.compose import And, Box, Composition, Mask, Regions
from ella_kd.conditioning.leaves import ELLA, Constant, as_conditioning
from ella_kd.conditioning.plan import Plan
from ella_kd.conditioning.switch import Switch, window
from ella_kd.models.context import Context
from ella_kd.models.network import Levels, above

__all__ = [
    "ELLA",
    "And",
    "Box",
    "Channels",
    "Combination",
    "Composition",
    "Concat",
    "Conditioning",
    "Constant",
    "Context",
    "Lerp",
    "Levels",
    "Mask",
    "Plan",
    "Regions",
    "Stack",
    "Switch",
    "With",
    "above",
    "as_conditioning",
    "lerp_features",
    "levels_of",
    "window",
]
