"""The guided denoiser: a rule over the answers of a denoiser, evaluated in as few UNet calls as possible."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ella_kd.bound import COND, UNCOND, BoundRun, Branch, Conditions
from ella_kd.conditioning import Levels
from ella_kd.denoiser import Condition, Denoiser, LDMDenoiser, lift_all, run_levels
from ella_kd.guidance.rule import CFG, Answers, Guidance, where_rows
from ella_kd.models.noise_schedule import EDMSchedule, NoiseSchedule
from ella_kd.models.patches import Patch, Recorder
from ella_kd.samplers.model import Prediction
from ella_kd.scale import Scale


class GuidedRun(BoundRun):
    """A guided denoiser bound to one run: asks the branches of its rule, and guides.

    rule: a function of the call's scale, None where the caller has none of its own. need_uncond: see `Denoiser.bind`.
    """

    def __init__(self, denoiser: LDMDenoiser, x: Tensor, levels: Levels, conditions: Conditions,
                 rule: Callable[[float | None], Guidance], need_uncond: bool, together: bool) -> None:
        super().__init__(denoiser, x, levels, conditions, together=together)
        self.rule, self.need_uncond = rule, need_uncond
        own = rule(None)
        own.check_rows(len(x))
        self.settled = None if own.varies else own.at(())
        self.prepare(levels if own.varies else levels[:1])

    def asks(self, levels: Levels, scale: float | None) -> tuple[Any, Mapping[Branch, Patch | None]]:
        rule = self.settled if scale is None and self.settled is not None else self.rule(scale).at(levels)
        recorders = {branch: Recorder(place) for branch, place in rule.watched.items()}
        uncond = (UNCOND,) if self.need_uncond and any(rule.guided) else ()
        branches = {branch: recorders.get(branch, branch.patch)
                    for branch in (COND, *rule.branches, *recorders, *uncond)}
        for branch in branches:
            if branch.cond not in self.conditions:
                advice = 'pass uncond=t5(""), or a negative prompt' if branch.cond == "uncond" else \
                    f"pass {branch.cond}=..."
                raise ValueError(f"{rule} needs {branch.cond}: {advice}")
        return (rule, recorders, levels), branches

    def finish(self, told: Any, x: Tensor, sigma: Tensor, denoised: Mapping[Branch, Tensor]) -> Prediction:
        rule, recorders, levels = told

        def again(x: Tensor, branch: Branch) -> Tensor:
            return self(x, levels, only=branch).denoised

        maps = {branch: recorder.received for branch, recorder in recorders.items()}
        cond, uncond = denoised[COND], denoised.get(UNCOND)
        if self.need_uncond and not all(rule.guided):
            uncond = cond if uncond is None else where_rows(rule.guided, uncond, cond)
        return Prediction(rule(Answers(x, sigma, denoised, again, maps)), cond, uncond)


class GuidedDenoiser(Denoiser):
    """A denoiser steered by a guidance rule: `GuidedDenoiser(ELLADenoiser(unet, tsc), Rescale(CFG(7), 0.7))`.

    `denoiser(x, sigma, cond=..., uncond=...)`, and other conditions by the names the rule asks for (`image=`). A
    condition is a Conditioning, `And` and `Regions` included, or text features. Every answer the rule needs comes from
    one UNet call, whatever the lengths of the tokens; together=False makes one call for each, which needs less memory
    and gives the same result. Raises TypeError for anything but a rule around an unguided denoiser.
    """

    inner_model: LDMDenoiser

    def __init__(self, inner_model: LDMDenoiser, guidance: Guidance, together: bool = True) -> None:
        super().__init__()
        if not isinstance(guidance, Guidance):
            raise TypeError(f"guidance must be a rule, such as CFG(7), got {guidance!r}")
        if isinstance(inner_model, GuidedDenoiser):
            raise TypeError(f"{type(self).__name__} guides a denoiser, and {type(inner_model).__name__} is guided "
                            "already: rules nest in one another, such as Rescale(CFG(7), 0.7)")
        if not isinstance(inner_model, LDMDenoiser):
            raise TypeError(f"{type(self).__name__} takes a denoiser, such as ELLADenoiser(unet, tsc) or "
                            f"LDMDenoiser(unet), got {type(inner_model).__name__}")
        self.inner_model = inner_model
        self.guidance = guidance
        self.together = together

    def _said(self) -> str:
        return f"{self.inner_model!r}, {self.guidance}"

    @property
    def schedule(self) -> NoiseSchedule | EDMSchedule:
        return self.inner_model.noise_schedule

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        return self.inner_model.sigma_to_t(sigma, quantize)

    def compile(self, **options: Any) -> None:
        """Compile the guided network in place, see `LDMDenoiser.compile`."""
        self.inner_model.compile(**options)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition, uncond: Condition | None = None,
                **others: Any) -> Tensor:
        """x [B, C, h, w], sigma [B] -> the guided denoised. Raises ValueError for a condition that the rule lacks."""
        return self.predict(x, sigma, cond=cond, uncond=uncond, **others).denoised

    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *, need_uncond: bool = False,
             **conditions: Condition | None) -> GuidedRun:
        if "cond_scale" in conditions:
            raise TypeError(f"the scale belongs to the rule, here {self.guidance}; a CFGDenoiser takes cond_scale")
        return self._bind(self._own_rule, x, sigmas, need_uncond, conditions)

    def _own_rule(self, scale: float | None) -> Guidance:
        if scale is not None:
            raise TypeError(f"the scale belongs to the rule, here {self.guidance}; a CFGDenoiser takes one per step")
        return self.guidance

    def _bind(self, rule: Callable[[float | None], Guidance], x: Tensor, sigmas: Sequence[float] | Tensor | None,
              need_uncond: bool, conditions: Mapping[str, Condition | None]) -> GuidedRun:
        if conditions.get("cond") is None:
            raise TypeError("guidance needs a condition: pass cond=t5(prompt)")
        lifted = lift_all(self.inner_model, conditions)
        return GuidedRun(self.inner_model, x, run_levels(sigmas, x), lifted, rule, need_uncond, self.together)


class CFGDenoiser(GuidedDenoiser):
    """Classifier-free guidance in the signature of k-diffusion scripts: `denoiser(x, sigma, cond, uncond, cond_scale)`.

    The same as a GuidedDenoiser with the rule `CFG(cond_scale)` (Ho and Salimans 2022, arXiv 2207.12598): uncond +
    cond_scale * (cond - uncond). Scale 1 asks for no uncond and evaluates none.
    """

    def __init__(self, inner_model: LDMDenoiser, together: bool = True) -> None:
        super().__init__(inner_model, CFG(1.0), together)

    def _said(self) -> str:
        return repr(self.inner_model)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition, uncond: Condition | None = None,
                cond_scale: Scale = 1.0, **others: Any) -> Tensor:
        """x [B, C, h, w], sigma [B] -> the guided denoised. Raises ValueError for an uncond that the scale lacks."""
        return self.predict(x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale, **others).denoised

    def bind(self, x: Tensor, sigmas: Sequence[float] | Tensor | None = None, *,  # type: ignore[override]
             need_uncond: bool = False, cond_scale: Scale = 1.0, **conditions: Condition | None) -> GuidedRun:
        own = CFG(cond_scale)
        return self._bind(lambda scale: own if scale is None else CFG(scale), x, sigmas, need_uncond, conditions)
