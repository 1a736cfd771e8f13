"""The connector's answers at the noise levels of a run: asked for in few large calls, then only looked up."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ella_kd.models.context import pile
from ella_kd.models.text import TextFeatures

READ = 1 << 24  # numbers of features that one call reads: 64 rows of 128 tokens of flan-t5-xl
ROWS = 1 << 10  # rows of one call at most: a small connector's layers are wider than its features
KEPT = 1 << 26  # numbers of tokens kept for the steps to come: 256 MB in fp32


class Plan:
    """What one run asks of its connectors. levels: the run's sigmas; timesteps [N]: of each, as the denoiser has it;
    times: the same on the host.

    It belongs to the run and goes with it: conditionings stay values.
    """

    def __init__(self, levels: Sequence[float], timesteps: Tensor, times: Sequence[float]) -> None:
        distinct = list(dict.fromkeys(times))
        self.index = {level: distinct.index(t) for level, t in zip(levels, times, strict=True)}
        self.timesteps = timesteps if len(distinct) == len(times) else timesteps[[times.index(t) for t in distinct]]
        self.tables: dict[Any, Table] = {}

    def table(self, connector: Callable[..., Tensor]) -> "Table":
        """Where all the prompts of one connector are: one call answers them all."""
        return self.tables.setdefault(connector, Table(self, connector))


class Table:
    """The prompts that one connector reads in a run, and what it says to them at the noise levels in turn.

    Calls are as large as `READ` allows, one for a whole run if it fits; answers of the past go when `KEPT` is reached.
    """

    def __init__(self, plan: Plan, connector: Callable[..., Tensor]) -> None:
        self.plan, self.connector = plan, connector
        self.features: dict[TextFeatures, slice] = {}
        self.answers: dict[int, Tensor] = {}

    def add(self, features: TextFeatures) -> slice:
        """Takes prompts [P, L, D] in; which of the table's they are."""
        if features not in self.features:
            start = max((part.stop for part in self.features.values()), default=0)
            self.features[features] = slice(start, start + len(features.tokens))
            self.answers.clear()  # they lack these prompts
        return self.features[features]

    def tokens(self, level: float) -> Tensor:
        """[all prompts, L, D] at one of the plan's levels."""
        i = self.plan.index[level]
        if i not in self.answers:
            self._ask(i)
        return self.answers[i]

    def _ask(self, wanted: int) -> None:
        """Answers for a timestep and its neighbours: the run's timesteps are cut into calls in one way, wherever the
        run begins, since a call of another size rounds otherwise (fp64: 1.7e-17 of a resumed run)."""
        tokens, mask = pile(list(self.features))
        prompts, rows = len(tokens), max(1, min(ROWS, READ // tokens[0].numel()))
        n = max(1, rows // prompts)
        block = range(len(self.plan.timesteps))[wanted // n * n:][:n]
        times = self.plan.timesteps[block.start:block.stop]
        args = [tokens.repeat(len(block), 1, 1), times.repeat_interleave(prompts)]
        args += [] if mask is None else [mask.repeat(len(block), 1)]
        calls = zip(*(arg.split(rows) for arg in args), strict=True)
        found = torch.cat([self.connector(*call) for call in calls]).unflatten(0, (len(block), prompts))
        if found[0].numel() * (len(self.answers) + len(block)) > KEPT:
            self.answers.clear()
        self.answers |= zip(block, found)
