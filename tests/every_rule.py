"""Every guidance rule, on a small denoiser; for a batch of two."""

from ella_kd import ELLADenoiser
from ella_kd.guidance import (
    APG,
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    TCFG,
    AutoGuidance,
    CFGZeroStar,
    DynamicThreshold,
    Guidance,
    Interval,
    MimicScale,
    Rescale,
)
from tiny import tiny_tsc, tiny_unet

INNER = ELLADenoiser(tiny_unet(), tiny_tsc())
WEAK = ELLADenoiser(tiny_unet(4), tiny_tsc())
PLACE = tiny_unet().places[0]
RULES: list[Guidance] = [
    CFG(3.0), CFG([3.0, 1.0]), CFG(lambda sigma: 1 + sigma), Interval(CFG(3.0), 1.0), Rescale(CFG(3.0), 0.7),
    DynamicThreshold(CFG(3.0), 0.9), MimicScale(CFG(6.0), 3.0), APG(3.0), CFGZeroStar(3.0), TCFG(3.0),
    AutoGuidance(CFG(3.0), WEAK, 1.5), PAG(CFG(3.0), 2.0, (PLACE,)), SEG(CFG(3.0), 2.0, places=(PLACE,)),
    SLG(CFG(3.0), 2.0, (PLACE,)), SAG(CFG(3.0), 0.75, place=PLACE),
    PAG(Interval(Rescale(CFG(3.0)), 1.0), 2.0, (PLACE,)),
]
