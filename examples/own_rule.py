"""A guidance rule of your own: a frozen dataclass that says what it needs and what to make of it."""

from dataclasses import dataclass

from ella_kd import CFG, Pipeline, draw
from ella_kd.guidance import COND, Answers, Branch, Guidance


@dataclass(frozen=True)
class Centred(Guidance):
    """The mean of each channel comes from the conditional answer: guidance moves shapes, not the overall colour."""
    base: Guidance

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*self.base.branches, COND)

    def __call__(self, answers: Answers):
        guided, cond = self.base(answers), answers[COND]
        return guided - guided.mean((2, 3), keepdim=True) + cond.mean((2, 3), keepdim=True)


sd = Pipeline.miniature()
prompt = sd.encode("The scene is set in a dark night. A red heart sits in the center.")
draw(sd, prompt, uncond=sd.encode(""), guidance=Centred(CFG(5)))[0].save("own_rule.png")
