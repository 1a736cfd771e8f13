"""Hires fix: a second pass is a run of its own over the first one's picture, kept in the PNG, whatever enlarges it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from ella_kd import Pipeline, draw, generate, read_settings
from ella_kd.cli import main
from ella_kd.jobs import jobs
from ella_kd.models.files.hashes import sha256
from ella_kd.pictures import upscalers
from ella_kd.pictures.hires import Hires
from ella_kd.pictures.hires_options import LATENTS, PIXELS, Enlargement
from ella_kd.pictures.upscalers import enlarged, network_of
from ella_kd.request import Request

OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"hires": "2:0.5"}, "size": {"hires": "16x24:0.4", "hires_upscaler": "latent (nearest-exact)"},
    "own size": {"hires": ":0.5", "width": 32, "height": 16}, "steps": {"hires": 1.5, "hires_steps": 3},
    "sampler": {"hires": "2:0.7", "hires_sampler": "euler_ancestral", "hires_schedule": "exponential"},
    "texts": {"hires": 2, "hires_prompt": "a (red:1.2) [ring|heart]", "hires_negative": "grey", "syntax": True},
    "scale of guidance": {"hires": 2, "hires_scale": 3.0, "guidance": "Rescale(CFG(2), 0.5)"},
    "reuse": {"hires": "2:0.5", "reuse": "2:2", "steps": 4},
    "cfg_pp": {"hires": 2, "sampler": "euler_cfg_pp", "scale": 0.5, "hires_sampler": "dpmpp_2m", "hires_scale": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tiny_files: dict[str, str]) -> Pipeline:
    return Pipeline.load(**tiny_files, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_draws_and_is_drawn_again(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"width": 16, "height": 12, "steps": 2, "seeds": 3, "scale": 2.0, **OPTIONS[name]}
    [picture] = generate(pipeline, "a red circle", progress=False, **options)
    assert np.asarray(picture.image).std() > 0
    picture.save(tmp_path / "drawn.png")
    [again] = generate(pipeline, progress=False, **read_settings(tmp_path / "drawn.png"))
    assert again.settings == picture.settings
    assert again.image.tobytes() == picture.image.tobytes()
    assert Request.from_text(picture.settings.parameters()).arguments() == picture.settings.arguments()


def test_a_second_pass_is_img2img_of_the_first(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own noise levels and tokens, sigma for sigma; the first pass is the picture without hires, bit for bit."""
    seen: list[dict[str, Any]] = []
    texts: dict[str, Any] = {"uncond": pipeline.encode(""), "progress": False, "sampler": "euler", "steps": 3}
    before: list[Tensor] = []

    def enlarged_latents(vae: Any, z: Tensor, *rest: Any) -> Tensor:
        before.append(z)
        return upscalers.enlarged_latents(vae, z, *rest)

    monkeypatch.setattr("ella_kd.pictures.hires.enlarged_latents", enlarged_latents)
    cond, ring = pipeline.encode("a red circle"), pipeline.encode("a blue ring")
    how = Hires((32, 16), 0.5, "latent", steps=4, cond=ring, guidance=3.0)
    [twice] = draw(pipeline, cond, width=16, height=8, seeds=7, hires=how, callback=seen.append, **texts)
    assert twice.size == (32, 16) and len(seen) == 3 + 4
    whole = pipeline.denoiser()
    sigmas = how.sigmas(pipeline, "karras", 3)
    from ella_kd.samplers import get_sigmas_karras
    assert torch.equal(sigmas, get_sigmas_karras(8, whole.sigma_min, whole.sigma_max)[-5:])
    assert [float(each["sigma"]) for each in seen[3:]] == sigmas[:-1].tolist()
    [first] = draw(pipeline, cond, width=16, height=8, seeds=7, **texts)
    [alone] = draw(pipeline, cond, width=16, height=8, seeds=7, latents=before[0], sigmas=[1e-4, 0.0], **texts)
    assert np.abs(np.asarray(first).astype(int) - np.asarray(alone)).max() <= 1
    noise = (seen[3]["x"] - upscalers.enlarged_latents(pipeline.vae, before[0], (32, 16), "latent")) / sigmas[0]
    assert abs(float(noise.std()) - 1) < 0.3
    texts |= {"uncond": texts["uncond"], "steps": 9}
    [again] = draw(pipeline, ring, latents=seen[3]["x"], sigmas=sigmas, seeds=1, guidance=3.0,
                   **{**texts, "steps": 9})
    assert again.tobytes() == twice.tobytes()  # euler: no noise of its own


def test_rows_are_their_own(pipeline: Pipeline) -> None:
    text, nothing = pipeline.encode("a red circle"), pipeline.encode("")
    for upscaler in ("latent (bicubic antialiased)", "bicubic", lambda picture: picture.resize((64, 64))):
        options: dict[str, Any] = {"uncond": nothing, "steps": 2, "progress": False, "width": 16, "height": 16,
                                   "sampler": "dpmpp_2m_sde", "hires": Hires((24, 32), 0.6, upscaler)}
        pair, alone = draw(pipeline, text, seeds=[1, 2], **options), draw(pipeline, text, seeds=2, **options)
        assert np.abs(np.asarray(pair[1]).astype(int) - np.asarray(alone[0])).max() <= 1
        assert pair[0].tobytes() != pair[1].tobytes()


def test_latents_are_enlarged_as_a1111_does(pipeline: Pipeline) -> None:
    z = torch.randn(1, 4, 4, 6)
    for name, (mode, antialias) in LATENTS.items():
        mine = upscalers.enlarged_latents(pipeline.vae, z, (48, 32), name)
        assert torch.equal(mine, torch.nn.functional.interpolate(z, (8, 12), mode=mode, antialias=antialias))
    for name in PIXELS:
        assert upscalers.enlarged_latents(pipeline.vae, z, (48, 32), name).shape == (1, 4, 8, 12)


def test_sizes() -> None:
    def sizes(said: object, given: tuple[int, int], own: int = 512, factor: int = 8) -> Any:
        return Enlargement.read(said).sizes(given, (own, own), factor)

    assert sizes("2:0.5", (512, 768)) == ((512, 768), (1024, 1536))
    assert sizes(1.5, (520, 512)) == ((520, 512), (784, 768))
    assert sizes("1536x1024", (768, 512)) == ((768, 512), (1536, 1024))
    assert sizes("96x0", (512, 768)) == ((512, 768), (96, 144)) and sizes("0x96", (512, 768))[1] == (64, 96)
    assert sizes(":0.4", (1536, 1024)) == ((640, 448), (1536, 1024))
    assert sizes(0.4, (512, 384)) == ((512, 384), (512, 384))
    assert sizes(":0.4", (96, 48), 48, 8) == ((64, 32), (96, 48))
    assert str(Enlargement.read(" 2 ")) == "2:0.5" and str(Enlargement.read("8x16:.25")) == "8x16:0.25"


def test_a1111s_words() -> None:
    text = ("a cat\nNegative prompt: b\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, "
            'Size: 512x768, Model: m, Denoising strength: 0.55, Hires prompt: "a cat, sharp", Hires upscale: 2, '
            "Hires steps: 12, Hires upscaler: Latent (nearest-exact), Hires schedule type: Karras, Version: v1.10.1")
    read = Request.from_text(text)
    assert (read.hires, read.hires_upscaler, read.hires_steps) == ("2:0.55", "latent (nearest-exact)", 12)
    assert (read.hires_prompt, read.hires_schedule) == ("a cat, sharp", "karras")
    said = read.parameters()
    for words in ("Denoising strength: 0.55", "Hires upscale: 2", "Hires upscaler: Latent (nearest-exact)",
                  "Hires steps: 12", "Size: 512x768", "Hires schedule type: Karras"):
        assert words in said


@pytest.mark.parametrize(("given", "message"), [
    ({"hires": "large"}, "SCALE:STRENGTH"), ({"hires": "2:1.5"}, "strength"), ({"hires": "99"}, "1 to 64"),
    ({"hires": "0x0:0.5"}, "at least 1"),
    ({"hires_steps": 3}, "hires_steps is about a second pass"), ({"hires": 2, "start": "a.png"}, "from noise"),
    ({"hires": 2, "hires_sampler": "eulr"}, "euler"), ({"hires": 2, "hires_steps": 0}, "hires_steps"),
    ({"hires": 2, "sampler": "euler_ancestral", "eta": 0.5, "hires_sampler": "lms"}, "has no eta"),
])
def test_bad_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request("a", **given)


MISSING = {"lanzcos": "did you mean lanczos", "4x.pth": "no upscaler at 4x.pth: choose latent",
           "R-ESRGAN 4x+": "RealESRGAN_x4plus.pth: give that file", "the function f": "give it again as hires_upscaler"}


@pytest.mark.parametrize("name", [*MISSING, "no spandrel", "a LoRA", "no folder"])
def test_an_upscaler_that_there_is_not_is_found_before_anything_is_drawn(pipeline: Pipeline, name: str, files: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """By generate, jobs and the command, for both ways to enlarge."""
    save_esrgan(files / "esrgan.pth")
    given = {"no spandrel": "esrgan.pth", "a LoRA": "style.safetensors", "no folder": "esrgan"}.get(name, name)
    what = MISSING.get(name) or {"no spandrel": "pip install", "a LoRA": "looks like a LoRA",
                                 "no folder": "no folder of models at nowhere"}[name]
    models_dir = "nowhere" if name == "no folder" else None
    if name == "no spandrel":
        monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.setattr("ella_kd.jobs.draw", pytest.fail)
    for how in ({"hires": "2:0.5"}, {"upscale": "tiles:2"}):
        options: dict[str, Any] = {**how, "hires_upscaler": given}
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(what)):
            generate(pipeline, "a", seeds=1, models_dir=models_dir, **options)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(what)):
            list(jobs(pipeline, [Request("a", **options)], models_dir=models_dir))
    words = ["--models-dir", models_dir] if models_dir else []
    said = CliRunner().invoke(main, ["generate", "a", "--hires", "2", "--hires-upscaler", given, *words])
    assert said.exit_code == 2 and what in said.output, said.output


def test_the_file_of_a_network(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up among the models, under the web UI's name too; its hash is kept; its device is the pipeline's, for as
    long as it works."""
    file = tmp_path / "models" / "ESRGAN" / "RealESRGAN_x4plus.pth"
    file.parent.mkdir(parents=True)
    save_esrgan(file)
    where: list[torch.device] = []

    @contextmanager
    def carried(module: Any, device: torch.device) -> Iterator[None]:
        where.append(device)
        yield

    monkeypatch.setattr(upscalers, "carried", carried)
    how: dict[str, Any] = {"width": 8, "height": 8, "steps": 1, "seeds": 1, "progress": False, "hires": "2:0.5"}
    name = "R-ESRGAN 4x+"
    own: dict[str, Any] = {"models_dir": tmp_path}
    [drawn] = generate(pipeline, "a", hires_upscaler=name, **how, **own)
    [same] = generate(pipeline, "a", hires_upscaler=str(file), **how)
    [other] = generate(pipeline, "a", **how)
    assert drawn.image.tobytes() == same.image.tobytes() != other.image.tobytes()
    assert drawn.settings.hashes == (f"{name}={sha256(file)}",) and where == [torch.device("cpu")] * 2
    read = Request.from_text(drawn.settings.parameters())
    assert read.arguments() == drawn.settings.arguments()
    save_esrgan(file, seed=1)
    with pytest.warns(UserWarning, match="is not the file that drew the picture"):
        generate(pipeline, progress=False, **own, **read.arguments())
    enlarged(Image.new("RGB", (8, 8)), (16, 16), network_of(file), "meta")
    assert where[-1].type == "meta"


def save_esrgan(path: Path, seed: int = 0) -> None:
    with upscalers._torchvision():
        from spandrel.architectures.ESRGAN import ESRGAN
    torch.manual_seed(seed)
    torch.save({"params_ema": ESRGAN(num_filters=8, num_blocks=1, scale=2).state_dict()}, path)


def test_upscalers_that_there_are_not(pipeline: Pipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"width": 8, "height": 8, "steps": 1, "seeds": 1, "progress": False}
    with pytest.raises(FileNotFoundError, match="RealESRGAN_x4plus"):
        Hires((16, 16), upscaler="R-ESRGAN 4x+")
    with pytest.raises(ValueError, match="not its latents"):
        Request("a", upscale="tiles:2", hires_upscaler="Latent")
    with pytest.raises(TypeError, match="PIL image"):
        generate(pipeline, "a", hires="2", hires_upscaler=lambda picture: 3, **options)
    with pytest.raises(ValueError, match="multiples of 4"):
        generate(pipeline, "a", hires="9x9", **options)
    torch.save({"params_ema": {"a": torch.zeros(2)}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no upscaler that spandrel knows"):
        network_of(str(tmp_path / "a.pth"))


def test_networks_of_spandrel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESRGAN, SwinIR and DAT from files; tile by tile is the whole where convolutions see less than the margin."""
    with upscalers._torchvision():
        from spandrel.architectures.DAT import DAT
        from spandrel.architectures.ESRGAN import ESRGAN
        from spandrel.architectures.SwinIR import SwinIR
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 8, "embed_dim": 32, "num_heads": [2], "upscale": 2}
    networks = {"ESRGAN": ESRGAN(num_filters=8, num_blocks=1, scale=2),
                "SwinIR": SwinIR(window_size=4, depths=[1], upsampler="pixelshuffledirect", **small),
                "DAT": DAT(depth=[2], split_size=[2, 4], expansion_factor=2.0, **small)}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 36, 3), dtype=np.uint8))
    for name, network in networks.items():
        torch.save({"params_ema": network.state_dict()}, tmp_path / f"{name}.pth")
        found = network_of(str(tmp_path / f"{name}.pth"))
        assert found.network.architecture.name == name
        assert found(picture).size == (72, 40)
        assert enlarged(picture, (100, 70), str(tmp_path / f"{name}.pth")).size == (100, 70)
    whole = network_of(str(tmp_path / "ESRGAN.pth"))(picture)
    monkeypatch.setattr(upscalers, "TILE", 16)
    tiled = network_of(str(tmp_path / "ESRGAN.pth"))(picture)
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(tiled)).max() <= 1
