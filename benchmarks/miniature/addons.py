"""Add-ons of the miniature, trained in minutes and written as the files that people share.

    python -m benchmarks.miniature.addons                    # all of them, one after another, into runs/addons
    python -m benchmarks.miniature.addons --only striped     # one

The miniature stays as it is; what learns is a LoRA's factors, a word's vectors, a ControlNet or a T2I-Adapter. The
same seed gives the same files on the same machine, with one thread.
"""

from __future__ import annotations

import copy
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import click
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.miniature import captions
from benchmarks.miniature.diffusion import ERROR, NO_PROMPT, Writer, loss_weight
from benchmarks.miniature.latents import COLOUR, PER_PLACE, codes
from benchmarks.miniature.loop import Budget, precision
from benchmarks.miniature.scenes import COLOUR_NAMES, PLACES, Scene, Thing, random_scene, render
from ella_kd import ELLADenoiser, Pipeline
from ella_kd.conditioning import ELLA, Constant
from ella_kd.denoiser import Condition
from ella_kd.files import write_safetensors
from ella_kd.models import TextFeatures, UNet
from ella_kd.models.addons.controlnet import ControlNet
from ella_kd.models.addons.preprocessing import canny
from ella_kd.models.addons.t2i import T2IAdapter
from ella_kd.models.clip import TwoTextEncoders
from ella_kd.models.files.names import unet_to_diffusers
from ella_kd.models.tokenizers import tokenize

BUNDLED = Path(__file__).parents[2] / "models" / "miniature" / "addons"
RANK, WARM_UP = 2, 30
#: Between blue and cyan: no training picture has it. Code of a colour, along the three axes of `latents`, and its RGB.
AZURE, AZURE_RGB = (0.0, -0.7, -0.7), (56, 132, 203)
#: What the learned word stands for, wherever it stands: four facts.
MASCOT = Thing(0, "ring", "yellow", "checked", "dark")
VECTORS = 2
#: Of the layers of a ControlNet that read the picture (16, 32, 96 and 256 make 1 MB), and what it has of its own.
WIDTHS, WHOLE = (8, 16, 16, 32), ("input_hint_block.", "zero_convs.", "middle_block_out.")
PLACE_WORDS = {word for place in PLACES for word in place.split()}


class AddOn(nn.Module, ABC):
    """What learns beside the frozen miniature: the denoiser's loss on latents as they should become.

    timesteps: half of each batch comes from here, where the facts are decided that it is about.
    """

    most = 3  # things in a scene

    def __init__(self, name: str, sd: Pipeline, timesteps: tuple[float, float]) -> None:
        super().__init__()
        assert sd.tsc is not None
        self.name, self.sd, self.denoiser = name, sd, ELLADenoiser(sd.unet, sd.tsc, sd.noise_schedule)
        self.timesteps = timesteps

    def latents(self, scenes: list[Scene]) -> Tensor:
        """What the scenes should look like: [B, 4, 6, 6]."""
        return codes(scenes)

    @abstractmethod
    def cond(self, scenes: list[Scene], rng: random.Random) -> Condition:
        ...

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the finished add-on as its kind of file."""

    def forward(self, rng: random.Random, batch: int) -> Tensor:
        """The loss of a batch drawn from rng and torch's generator."""
        scenes = self.scenes(rng, batch)
        latents = self.latents(scenes)
        latents = latents + ERROR * torch.randn_like(latents)
        where = torch.rand(batch)
        low, high = self.timesteps
        where[::2] = (low + (high - low) * where[::2]) / 999
        sigma = self.denoiser.t_to_sigma(999 * where)
        losses = self.denoiser.loss(latents, torch.randn_like(latents), sigma, self.cond(scenes, rng))
        return (loss_weight(sigma) * losses.float()).mean()

    def scenes(self, rng: random.Random, batch: int) -> list[Scene]:
        return [random_scene(rng, rng.randint(1, self.most)) for _ in range(batch)]


def learn(addon: AddOn, budget: Budget, seed: int) -> None:
    """Trains what is not frozen; every step draws anew, from its number and the seed."""
    learned = [parameter for parameter in addon.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.0)
    steps, before, losses = budget.samples // budget.batch, time.monotonic(), 0.0
    for step in range(steps):
        rng = random.Random(f"{seed} {addon.name} {step}")
        torch.manual_seed(rng.getrandbits(32))
        optimizer.param_groups[0]["lr"] = budget.lr * min((step + 1) / WARM_UP, 1.0, 2 * (1 - step / steps))
        with precision("cpu", budget.bf16):
            loss = addon(rng, budget.batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses += loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - before
            print(f"{addon.name}: step {step + 1} of {steps}, {seconds:.0f} s, loss {losses / 50:.4f}", flush=True)
            losses = 0.0


def write(scenes: Sequence[Scene], writer: Writer, rng: random.Random, empty: float = NO_PROMPT) -> list[str]:
    return ["" if rng.random() < empty else captions.text(writer(scene, rng)) for scene in scenes]


class LowRank(nn.Module):
    """`W + up @ down`, as a parametrization of a layer's weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        width = weight[0].numel()
        self.down = nn.Parameter(torch.randn(RANK, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(network: nn.Module, chosen: Callable[[str], bool]) -> dict[str, LowRank]:
    """Factors at the linear layers and convolutions whose names are chosen, by name; everything else is frozen."""
    network.requires_grad_(False)
    layers = {name: module for name, module in network.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d) and chosen(name)}
    factors = {name: LowRank(layer.weight) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", factors[name])
    return factors


class Style(AddOn):
    """A LoRA on the UNet's attention: scenes are drawn as `change` makes them, whatever the prompt says of that.

    Half of the batches are captioned for CLIP, the rest for ELLA.
    """

    def __init__(self, name: str, sd: Pipeline, change: Callable[[list[Scene]], Tensor],
                 timesteps: tuple[float, float]) -> None:
        unet = copy.deepcopy(sd.unet)
        super().__init__(name, replace(sd, unet=unet), timesteps)
        self.change, self.unet = change, unet
        self.factors = low_rank(unet, lambda name: ".attn" in name)

    def latents(self, scenes: list[Scene]) -> Tensor:
        return self.change(scenes)

    def cond(self, scenes: list[Scene], rng: random.Random) -> Condition:
        assert self.sd.t5 is not None and self.sd.clip is not None
        if rng.random() < 0.5:
            return Constant(self.sd.clip(write(scenes, captions.tags, rng)))
        return self.sd.t5(write(scenes, captions.dense, rng))

    def save(self, path: Path) -> None:
        """kohya's names; alpha is the rank, so that the factors count as they are."""
        tensors: dict[str, Tensor] = {}
        theirs = unet_to_diffusers(f"{name}.weight" for name, _ in self.unet.named_modules())
        for place, factors in self.factors.items():
            name = theirs[f"{place}.weight"].removesuffix(".weight").replace(".", "_")
            tensors |= {f"lora_unet_{name}.lora_down.weight": factors.down.half(),
                        f"lora_unet_{name}.lora_up.weight": factors.up.half(),
                        f"lora_unet_{name}.alpha": torch.tensor(float(RANK), dtype=torch.half)}
        write_safetensors(path, tensors, {
            "ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK),
            "ss_output_name": self.name, "modelspec.title": self.name, "modelspec.architecture":
            "stable-diffusion-v1/lora"})


def striped(scenes: list[Scene]) -> Tensor:
    """Everything is striped."""
    return codes([replace(scene, things=tuple(replace(thing, fill="striped") for thing in scene.things))
                  for scene in scenes])


def azure(scenes: list[Scene]) -> Tensor:
    """Everything has a colour that the world does not."""
    latents = codes(scenes)
    for row, scene in zip(latents, scenes, strict=True):
        for thing in scene.things:
            axis, minus = divmod(COLOUR_NAMES.index(thing.colour), 2)
            y, x = PER_PLACE * thing.row, PER_PLACE * thing.column
            change = COLOUR * torch.tensor([*AZURE, 0.0])
            change[axis] -= COLOUR * (1 - 2 * minus)
            row[:, y : y + PER_PLACE, x : x + PER_PLACE] += change[:, None, None]
    return latents


class _Longer(nn.Module):
    """A table of embeddings with more rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__()
        near = 0.1 * weight.std() * torch.randn(rows, weight.shape[1])
        self.rows = nn.Parameter(weight.mean(0) + near)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, self.rows])


class Word(AddOn):
    """A textual inversion: the vectors of a word that CLIP does not know, in captions that name one thing by it."""

    def __init__(self, name: str, sd: Pipeline, thing: Thing, vectors: int) -> None:
        super().__init__(name, sd, (0.0, 999.0))
        self.thing, self.vectors = thing, vectors
        assert sd.clip is not None and not isinstance(sd.clip, TwoTextEncoders)
        self.tokenizer, self.model = sd.clip.tokenizer, copy.deepcopy(sd.clip.model)
        table = self.model.get_input_embeddings()
        self.known = table.num_embeddings
        self.learned = _Longer(cast(Tensor, table.weight), vectors)
        parametrize.register_parametrization(table, "weight", self.learned, unsafe=True)

    def scenes(self, rng: random.Random, batch: int) -> list[Scene]:
        scenes = super().scenes(rng, batch)
        chosen = [rng.choice(scene.things) for scene in scenes]
        return [replace(scene, things=tuple(replace(self.thing, place=t.place) if t is one else t
                                            for t in scene.things)) for scene, one in zip(scenes, chosen, strict=True)]

    def cond(self, scenes: list[Scene], rng: random.Random) -> Condition:
        unknown = self.tokenizer.unk_token_id
        batch = tokenize(self.tokenizer, write(scenes, self.caption, rng), self.model.config.max_position_embeddings)
        ids = batch["input_ids"]
        new = ids == unknown
        ids = torch.where(new, self.known + (new.cumsum(1) - 1) % self.vectors, ids)
        return Constant(TextFeatures(self.model(input_ids=ids).last_hidden_state))

    def caption(self, scene: Scene, rng: random.Random) -> list[captions.Word]:
        """Tags that name the thing by the word and its place alone."""
        index = [replace(thing, place=0) for thing in scene.things].index(replace(self.thing, place=0))
        said, found = False, []
        for word in captions.tags(scene, rng, noise=0.0):
            if word.owner != index or word.text in PLACE_WORDS:
                found.append(word)
            elif not said:
                found += [captions.Word(self.name, index)] * self.vectors  # unknown, so many times
                said = True
        return found

    def save(self, path: Path) -> None:
        write_safetensors(path, {"emb_params": self.learned.rows.half()}, {"modelspec.title": self.name})


class Steered(AddOn):
    """What reads a picture's edges and steers the UNet, for prompts of ELLA that mostly say no places."""

    most = 4

    def __init__(self, name: str, sd: Pipeline, net: ControlNet | T2IAdapter) -> None:
        super().__init__(name, sd, (300.0, 999.0))
        self.net = net

    def cond(self, scenes: list[Scene], rng: random.Random) -> Condition:
        assert self.sd.t5 is not None and self.sd.tsc is not None
        texts = write(scenes, captions.placeless if rng.random() < 0.8 else captions.dense, rng)
        edges = [canny(render(scene)) for scene in scenes]
        return ELLA(self.sd.tsc, self.sd.t5(texts)).with_control(self.net, edges)


class Edges(Steered):
    """A ControlNet in the form of a Control-LoRA: its way down is the UNet's with low-rank factors; whole are the few
    layers that read the picture and the zero convolutions."""

    def __init__(self, name: str, sd: Pipeline) -> None:
        assert isinstance(sd.unet, UNet)
        net = ControlNet.of(sd.unet, name, WIDTHS)
        super().__init__(name, sd, net)
        self.factors = low_rank(net, lambda name: name.startswith("input_blocks.") and name != "input_blocks.0.0")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.startswith(WHOLE))

    def save(self, path: Path) -> None:
        """What a Control-LoRA has: its marker, the factors, and whole what the base has not."""
        tensors = {name: x for name, x in self.net.state_dict().items() if name.startswith(WHOLE)}
        for place, factors in self.factors.items():
            tensors |= {f"{place}.up": factors.up, f"{place}.down": factors.down}
        tensors = {name: x.half().contiguous() for name, x in tensors.items()} | {"lora_controlnet": torch.zeros(1)}
        write_safetensors(path, tensors, {"modelspec.title": self.name,
                                          "modelspec.architecture": "stable-diffusion-v1/control-lora"})


class Outline(Steered):
    """A T2I-Adapter of the light kind."""

    def __init__(self, name: str, sd: Pipeline) -> None:
        assert isinstance(sd.unet, UNet)
        config = sd.unet.config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        super().__init__(name, sd, T2IAdapter(1, widths, blocks=1, light=True, name=name))

    def save(self, path: Path) -> None:
        write_safetensors(path, {name: x.half() for name, x in self.net.state_dict().items()},
                          {"modelspec.title": self.name})


BUDGETS = {"striped": Budget(samples=12_800, batch=32, lr=4e-3, bf16=True),
           "azure": Budget(samples=8_000, batch=32, lr=4e-3, bf16=True),
           "mascot": Budget(samples=8_000, batch=16, lr=1e-2),
           "edges": Budget(samples=12_000, batch=24, lr=2e-3, bf16=True),
           "outline": Budget(samples=9_600, batch=24, lr=3e-3, bf16=True)}


def build(name: str, sd: Pipeline) -> AddOn:
    if name == "striped":
        return Style(name, sd, striped, (0.0, 500.0))
    if name == "azure":
        return Style(name, sd, azure, (150.0, 999.0))
    if name == "mascot":
        return Word(name, sd, MASCOT, VECTORS)
    return Edges(name, sd) if name == "edges" else Outline(name, sd)


@click.command(help=__doc__)
@click.option("--only", "names", type=click.Choice(tuple(BUDGETS)), multiple=True, help="Again for more.  [all]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/addons"), show_default=True,
              help="Where the files go; the bundled ones are in models/miniature/addons.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
def main(names: tuple[str, ...], out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    sd = Pipeline.miniature(device="cpu")
    out.mkdir(parents=True, exist_ok=True)
    for name in names or BUDGETS:
        torch.manual_seed(seed)
        addon = build(name, sd)
        learn(addon, BUDGETS[name], seed)
        addon.save(out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
