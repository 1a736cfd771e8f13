"""The guided denoiser: a rule over the answers of a denoiser, evaluated in as few UNet calls as possible."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ella_kd.conditioning import Composition, Conditioning, Levels, Stack, levels_of, plan
from ella_kd.denoiser import Condition, LDMDenoiser
from ella_kd.guidance.rule import CFG, COND, UNCOND, Answers, Branch, Guidance, where_rows
from ella_kd.models.patches import Patch, Recorder
from ella_kd.scale import Scale

Conditions = Mapping[str, Conditioning | Composition]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What guidance saw and decided, each [B, C, h, w]; uncond is None where it was not evaluated.

    Where it is needed for CFG++ and a rule does not guide (rows outside an `Interval`), uncond is cond: with D - U = 0
    the method walks on cond, which is sampling without guidance. D = C with the real U would be CFG++'s strongest.
    """

    denoised: Tensor
    cond: Tensor
    uncond: Tensor | None


class Job(NamedTuple):
    """One row of UNet work per sample."""

    conditioning: Conditioning
    patch: Patch | None
    model: LDMDenoiser


class GuidedDenoiser(nn.Module):
    """A denoiser steered by a guidance rule: `GuidedDenoiser(ELLADenoiser(unet, tsc), Rescale(CFG(7), 0.7))`.

    `denoiser(x, sigma, cond=..., uncond=...)`, and other conditions by the names the rule asks for (`image=`). A
    condition is a Conditioning, text features, or a composition (`And`, `Regions`) of them. Every answer the rule needs
    comes from one UNet call, whatever the lengths of the tokens; together=False makes one call for each, which needs
    less memory and gives the same result.
    """

    def __init__(self, inner_model: LDMDenoiser, guidance: Guidance, together: bool = True) -> None:
        super().__init__()
        if not isinstance(guidance, Guidance):
            raise TypeError(f"guidance must be a rule, such as CFG(7), got {guidance!r}")
        self.inner_model = inner_model
        self.guidance = guidance
        self.together = together

    @property
    def sigma_min(self) -> float:
        return self.inner_model.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.inner_model.sigma_max

    @property
    def sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.inner_model.sigmas

    @property
    def log_sigmas(self) -> Tensor:
        """[N] float64, ascending."""
        return self.inner_model.log_sigmas

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timestep of a noise level: any shape -> fp32, clamped to the schedule."""
        return self.inner_model.sigma_to_t(sigma, quantize)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The noise level of a timestep: any shape, dtype kept."""
        return self.inner_model.t_to_sigma(t)

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """n noise levels evenly spaced in t, or all of them, descending, then 0: [n + 1]."""
        return self.inner_model.get_sigmas(n)

    def compile(self, **options: Any) -> None:
        """Compile the guided network in place, see `LDMDenoiser.compile`."""
        self.inner_model.compile(**options)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition, uncond: Condition | None = None,
                **others: Any) -> Tensor:
        """x [B, C, h, w], sigma [B] -> the guided denoised. Raises ValueError for a condition that the rule lacks."""
        return self.predict(x, sigma, cond=cond, uncond=uncond, **others).denoised

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, *, level: float | None = None,
                **conditions: Condition | None) -> Prediction:
        """The guided answer with its two halves; need_uncond: evaluate uncond even if the rule does without (CFG++).

        level: the sigma of all rows as a number, where the caller knows it: spares reading it from the device.
        """
        if "cond_scale" in conditions:
            raise TypeError(f"the scale belongs to the rule, here {self.guidance}; a CFGDenoiser takes cond_scale")
        return self._predict(self.guidance, x, sigma, need_uncond, level, conditions)

    def planned(self, sigmas: Tensor, extra_args: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's extra_args with every condition planned for all sigmas [N] of the run, in one TSC call.

        `level` is added for the sampler to fill with each evaluation's sigma.
        """
        names = [name for name, value in extra_args.items() if name not in NOT_CONDITIONS and value is not None]
        rules = [self.guidance.at((sigma,)) for sigma in sigmas.tolist()]
        models = dict.fromkeys(branch.model or self.inner_model for rule in rules for branch in (COND, *rule.branches))
        timesteps = torch.cat([model.timesteps(sigmas) for model in models])
        conditions = plan([self._lift(extra_args[name]) for name in names], timesteps)
        return {**extra_args, **dict(zip(names, conditions, strict=True)), "level": None}

    def _predict(self, rule: Guidance, x: Tensor, sigma: Tensor, need_uncond: bool, level: float | None,
                 conditions: Mapping[str, Condition | None]) -> Prediction:
        if conditions.get("cond") is None:
            raise TypeError("guidance needs a condition: pass cond=t5(prompt)")
        lifted = {name: self._lift(value) for name, value in conditions.items() if value is not None}
        for name, condition in lifted.items():
            if condition.rows not in (1, len(x)):
                raise ValueError(f"{name} has {condition.rows} rows and the batch {len(x)}: give one row, or one per "
                                 "sample")
        rule.check_rows(len(x))
        levels: Levels = ()
        if rule.varies or any(condition.varies for condition in lifted.values()):
            levels = levels_of(sigma, level)
            lifted = {name: condition.at(levels) for name, condition in lifted.items()}
        rule = rule.at(levels)

        watched, guided = rule.watched, rule.guided
        wanted = dict.fromkeys((COND, *rule.branches, *watched, *((UNCOND,) if need_uncond and any(guided) else ())))
        for branch in wanted:
            if branch.cond not in lifted:
                advice = 'pass uncond=t5(""), or a negative prompt' if branch.cond == "uncond" else \
                    f"pass {branch.cond}=..."
                raise ValueError(f"{rule} needs {branch.cond}: {advice}")
        recorders = {branch: Recorder(place) for branch, place in watched.items()}
        denoised = self._evaluate(wanted, x, sigma, levels, lifted, recorders)

        def evaluate(x: Tensor, branch: Branch) -> Tensor:
            return self._evaluate([branch], x, sigma, levels, lifted, {})[branch]

        maps = {branch: recorder.map for branch, recorder in recorders.items()}
        answers = Answers(x, sigma[:, None, None, None].to(x.dtype), denoised, evaluate, maps)
        uncond = denoised.get(UNCOND)
        if need_uncond and not all(guided):
            uncond = denoised[COND] if uncond is None else where_rows(guided, uncond, denoised[COND])
        return Prediction(rule(answers), denoised[COND], uncond)

    def _evaluate(self, branches: Iterable[Branch], x: Tensor, sigma: Tensor, levels: Levels, conditions: Conditions,
                  recorders: Mapping[Branch, Recorder]) -> dict[Branch, Tensor]:
        """The denoised of each branch: what the network says to each of its terms, weighted."""
        weighted: dict[Branch, list[tuple[Job, float | Tensor]]] = {}
        for branch in branches:
            model = branch.model or self.inner_model
            patch = recorders.get(branch, branch.patch)
            terms = _terms(branch.cond, conditions, x, levels)
            weighted[branch] = [(Job(c, patch, model), weight) for c, weight in terms]
        jobs = dict.fromkeys(job for terms in weighted.values() for job, _ in terms)
        answers: dict[Job, Tensor] = {}
        for model in dict.fromkeys(job.model for job in jobs):
            same = [job for job in jobs if job.model is model]
            for some in [same] if self.together else [[job] for job in same]:
                answers |= zip(some, _call(model, some, x, sigma), strict=True)
        return {branch: _sum([(answers[job], weight) for job, weight in terms]) for branch, terms in weighted.items()}

    def _lift(self, condition: Condition) -> Conditioning | Composition:
        return condition.map(self._lift) if isinstance(condition, Composition) else self.inner_model.lift(condition)


NOT_CONDITIONS = ("cond_scale", "level")


class CFGDenoiser(GuidedDenoiser):
    """Classifier-free guidance in the signature of k-diffusion scripts: `denoiser(x, sigma, cond, uncond, cond_scale)`.

    The same as a GuidedDenoiser with the rule `CFG(cond_scale)` (Ho and Salimans 2022, arXiv 2207.12598): uncond +
    cond_scale * (cond - uncond). Scale 1 asks for no uncond and evaluates none.
    """

    def __init__(self, inner_model: LDMDenoiser, together: bool = True) -> None:
        super().__init__(inner_model, CFG(1.0), together)

    def predict(self, x: Tensor, sigma: Tensor, need_uncond: bool = False, *,  # type: ignore[override]
                level: float | None = None, cond_scale: Scale = 1.0,
                **conditions: Condition | None) -> Prediction:
        """The guided answer with its two halves; need_uncond: evaluate uncond even at scale 1 (CFG++ steps on it)."""
        return self._predict(CFG(cond_scale), x, sigma, need_uncond, level, conditions)


def _terms(name: str, conditions: Conditions, x: Tensor, levels: Levels) -> list[tuple[Conditioning, float | Tensor]]:
    condition = conditions[name]
    if isinstance(condition, Conditioning):
        return [(condition, 1.0)]
    terms: list[tuple[Conditioning, float | Tensor]] = []
    for part, weight in condition.terms(x.shape[2], x.shape[3], levels):
        weight = weight.to(x.device, x.dtype) if isinstance(weight, Tensor) else weight
        if part is not None:
            terms.append((part, weight))
        elif name == "uncond" or "uncond" not in conditions:
            advice = "give Regions a background, or weights that sum to 1" if name == "uncond" else 'pass uncond=t5("")'
            raise ValueError(f"the weights of {name} do not sum to 1 everywhere, the rest would be uncond's: {advice}")
        else:
            terms += [(c, weight * w) for c, w in _terms("uncond", conditions, x, levels)]
    return terms


def _call(model: LDMDenoiser, jobs: list[Job], x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    patches = tuple((len(x), job.patch) for job in jobs) if any(job.patch for job in jobs) else ()
    if len(jobs) == 1:
        return (model(x, sigma, jobs[0].conditioning, patches=patches),)
    conditions = [job.conditioning for job in jobs]
    stack = Stack(*(c if c.rows == len(x) else c.repeat(len(x)) for c in conditions))
    n = len(jobs)
    return model(x.repeat(n, 1, 1, 1), sigma.repeat(n), stack, patches=patches).chunk(n)


def _sum(terms: list[tuple[Tensor, float | Tensor]]) -> Tensor:
    if len(terms) == 1 and isinstance(terms[0][1], float) and terms[0][1] == 1.0:
        return terms[0][0]
    return torch.stack([answer * weight for answer, weight in terms]).sum(0)
