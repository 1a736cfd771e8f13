# ruff: noqa: F401, F403, I001
"""Samplers, step schedules and noise: they know x, sigma and a model, nothing of text or networks.

A method's file has its solver, its sample_NAME, its row of SAMPLERS and its CFG++ form, by one registration; a schedule
stands with its own. model(x, sigma, **extra_args) -> denoised; x [B, C, h, w] float32 or float64 at noise level
sigmas[0]; sigmas [n + 1]. Every sample_NAME has k-diffusion's or ComfyUI's arguments, their order and defaults, and
`seeds` by keyword, which name the noise of each row (without them one seed per row comes from torch's global
generator). All return x at sigmas[-1] and raise what `ella_kd.samplers.driver.sample` raises.
"""

from types import ModuleType

from ella_kd.samplers.cfg_pp import CFGpp
from ella_kd.samplers.driver import Interrupted, Run, sample
from ella_kd.samplers.model import Prediction, bind
from ella_kd.samplers.noise import BrownianNoise, NormalNoise, randn
from ella_kd.samplers.registry import *
from ella_kd.samplers.solver import Solver, Step
from ella_kd.samplers.state import load_run, save_run, without_history

# The order of the tables:
from ella_kd.samplers.euler import *
from ella_kd.samplers.heun import *
from ella_kd.samplers.heunpp import *
from ella_kd.samplers.restart import *
from ella_kd.samplers.dpm_solver import *
from ella_kd.samplers.dpm_adaptive import *
from ella_kd.samplers.dpmpp import *
from ella_kd.samplers.res import *
from ella_kd.samplers.unipc import *
from ella_kd.samplers.adams import *
from ella_kd.samplers.exponential_sde import *
from ella_kd.samplers.sa_solver import *
from ella_kd.samplers.er_sde import *
from ella_kd.samplers.lcm import *
from ella_kd.samplers.schedules import *
from ella_kd.samplers.timestep_schedules import *
from ella_kd.samplers.compatible_schedules import *
from ella_kd.samplers.names import *

__all__ = [name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, ModuleType)]
__all__.remove("ModuleType")
