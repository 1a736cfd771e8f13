"""Where parts are and in which numbers: defaults, what leaves memory, what moves, and what moves at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ella_kd import Pipeline, generate, placement
from ella_kd import pipeline as pipelines
from ella_kd.models import AutoencoderKL, FeatureCache, T5TextEncoder, VAEConfig, vae
from ella_kd.placement import Place, Placement, carried
from systems import system

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(("policy", "part", "family", "place"), [
    (Placement("cpu"), "unet", "sd1", Place(CPU, F32, CPU)),
    (Placement("cpu"), "t5", "", Place(CPU, F32, None)),
    (Placement("cpu", "bfloat16"), "unet", "", Place(CPU, BF16, CPU)),
    (Placement("cpu", "bfloat16"), "t5", "", Place(CPU, F32, None)),
    (Placement("cpu", "bfloat16", t5_dtype=BF16, keep_t5=True), "t5", "", Place(CPU, BF16, CPU)),
    (Placement("cuda"), "unet", "sdxl", Place(CUDA, F16, CUDA)),
    (Placement("cuda"), "clip", "sdxl", Place(CUDA, F16, CUDA)),
    (Placement("cuda"), "vae", "sd1", Place(CUDA, F16, CUDA)),
    (Placement("cuda"), "vae", "sdxl", Place(CUDA, F32, CUDA)),
    (Placement("cuda", vae_dtype="float16"), "vae", "sdxl", Place(CUDA, F16, CUDA)),
    (Placement("cuda", "bfloat16"), "vae", "sdxl", Place(CUDA, BF16, CUDA)),
    (Placement("cuda", "bfloat16"), "t5", "", Place(CUDA, F16, CPU)),
    (Placement("cuda", keep_t5=True), "t5", "", Place(CUDA, F16, CUDA)),
    (Placement("cuda", offload=True), "tsc", "", Place(CUDA, F16, CPU)),
    (Placement("mps"), "t5", "", Place(MPS, F16, None)),
])
def test_right_by_default_and_what_is_said_wins(policy: Placement, part: Any, family: str, place: Place,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "check_device", torch.device)  # this machine may have none of them
    assert policy.of(part, family) == place


def test_a_file_is_read_into_the_dtypes_of_its_family(tmp_path: Path, tiny_files: dict[str, Any]) -> None:
    file = system("sdxl").save_file(tmp_path / "xl.safetensors")
    with pytest.warns(UserWarning, match="float16 on a CPU"):
        sd = Pipeline.load(file, prediction="eps", placement=Placement("cpu", "float16"))
    assert (sd.dtype, sd.vae.dtype) == (F16, F32)
    sd = Pipeline.load(**tiny_files, placement=Placement("cpu", "bfloat16"))
    assert sd.t5 is not None and (sd.dtype, sd.vae.dtype, sd.t5.model.dtype) == (BF16, BF16, F32)
    with pytest.raises(ValueError, match="device and dtype belong to the placement"):
        Pipeline.load(file, device="cpu", placement=Placement())


def test_t5_leaves_memory_once_a_batch_is_encoded(tiny_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    plain: Any = T5TextEncoder.from_folder

    def reading(*words: Any, **named: Any) -> T5TextEncoder:
        reads.append(words)
        return plain(*words, **named)

    monkeypatch.setattr(T5TextEncoder, "from_folder", reading)
    leaves, stays = (Pipeline.load(**tiny_files, placement=Placement("cpu", keep_t5=keep)) for keep in (False, True))
    at_steps = []

    def pixels(sd: Pipeline) -> list[bytes]:
        return [picture.image.tobytes() for picture in generate(
            sd, ["a red circle", "a blue square"], seeds=[1, 2], steps=2, batch_size=1, progress=False,
            callback=lambda _: at_steps.append(sd.t5 is not None and sd.t5.loaded))]

    assert pixels(leaves) == pixels(stays)
    assert at_steps == [False] * 4 + [True] * 4, "at no step of the one, at each of the other"
    assert len(reads) == 2 + 1, "each once, and once more for the second batch"
    assert "t5 T5TextEncoder" in repr(leaves) and "not in memory" in repr(leaves.t5)
    moved = leaves.to(dtype=torch.float64)
    assert moved.t5 is not None and moved.placement is not None and moved.placement.keep_t5 is False
    moved.rest()
    assert not moved.t5.loaded and moved.t5.model.dtype == torch.float64, "read again as it was moved"


def test_t5_waits_elsewhere_and_comes_back(tiny_files: dict[str, Any], tmp_path: Path) -> None:
    """As from a GPU to the CPU's memory; meta is the other device here, so what comes back has no numbers."""
    t5 = T5TextEncoder.from_folder(tiny_files["t5"])
    cache = FeatureCache(tmp_path, "tiny", lambda: t5)
    tokens = cache("a red circle").tokens
    cache.release(torch.device("cpu"))
    assert t5.loaded and torch.equal(t5("a red circle").tokens, tokens)
    lonely = T5TextEncoder(t5.model, t5.tokenizer)
    lonely.release()
    assert lonely.loaded, "nothing could read it again"
    t5.release(torch.device("meta"))
    assert t5._model is not None and t5._model.device.type == "meta" and t5._back == CPU


def test_parts_come_to_the_device_one_by_one(tiny_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Placement("cpu", offload=True, keep_t5=True)
    sd = Pipeline.load(**tiny_files, placement=policy)
    names = {id(sd.unet): "unet", id(sd.tsc): "tsc", id(sd.vae): "vae", id(sd.clip and sd.clip.model): "clip"}
    log: list[str] = []

    @contextmanager
    def carried(module: nn.Module, device: torch.device) -> Iterator[None]:
        log.append(f"+{names[id(module)]}")
        yield
        log.append(f"-{names[id(module)]}")

    monkeypatch.setattr(pipelines, "carried", carried)
    for module, name in ((sd.unet, "unet!"), (sd.vae.decoder, "vae!")):
        module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    asked: dict[str, Any] = {"steps": 1, "seeds": 1, "progress": False}
    pictures = generate(sd, "a red circle", negative_mode="clip", **asked)
    assert log == ["+clip", "-clip", "+unet", "+tsc", "unet!", "-tsc", "-unet", "+vae", "vae!", "-vae"]
    plain = generate(replace(sd, placement=None), "a red circle", negative_mode="clip", **asked)
    assert pictures[0].image.tobytes() == plain[0].image.tobytes()


def test_what_is_carried_is_back_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.BatchNorm1d(3)

    def places() -> dict[str, tuple[Any, int]]:
        return {name: (x, x.data_ptr()) for name, x in layer.state_dict(keep_vars=True).items()}

    before = places()
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: x.clone())  # as from one memory to another
    try:
        with carried(layer, CUDA):
            inside = places()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(inside[name][0] is before[name][0] and inside[name][1] != before[name][1] for name in before)
    assert all(places()[name][0] is before[name][0] and places()[name][1] == before[name][1] for name in before)


@pytest.mark.parametrize("side", [16, 32])
def test_the_autoencoder_takes_no_more_at_once_than_a_large_picture(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1)).eval().requires_grad_(False)
    images = torch.rand(5, 3, side, side) * 2 - 1
    latents = model.encode(images)
    whole = model.decode(latents)
    sizes: list[tuple[str, int]] = []
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        part.register_forward_pre_hook(lambda _, given, name=name: sizes.append((name, len(given[0]))))
    monkeypatch.setattr(vae, "AT_ONCE", 2 * 16 * 16)
    torch.testing.assert_close(model.encode(images), latents)
    torch.testing.assert_close(model.decode(latents), whole)
    batches = [2, 2, 1] if side == 16 else [1] * 5
    assert sizes == [(name, n) for name in ("encoder", "decoder") for n in batches]
