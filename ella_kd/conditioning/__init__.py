"""Conditionings: functions of the timestep that give the UNet its tokens, and the ways to combine them.

`conditioning(t) -> Context`. A plain prompt is a constant function, an ELLA prompt asks its connector at every t, and
conditionings combine into new ones: `Concat`, `Stack`, `Lerp`, `Switch`, `window`, `Channels` combine tokens; `And` and
`Regions` combine what the network answers. They are values: nothing here changes an object after it was made.
"""

from ella_kd.conditioning.base import ELLA, Conditioning, Constant, Context, Levels, above, levels_of
from ella_kd.conditioning.combine import Channels, Combination, Concat, Lerp, Stack, lerp_features
from ella_kd.conditioning.compose import And, Box, Composition, Mask, Regions
from ella_kd.conditioning.plan import Planned, plan
from ella_kd.conditioning.switch import Switch, window

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
    "Planned",
    "Regions",
    "Stack",
    "Switch",
    "above",
    "lerp_features",
    "levels_of",
    "plan",
    "window",
]
