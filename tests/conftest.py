"""One thread, one hypothesis profile, float64 on request; and a whole text-to-image system with random weights, in the
files of the real one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from addon_files import write_files
from ella_kd import Pipeline
from ella_kd.models import TSC, AutoencoderKL, UNet, UNetConfig, VAEConfig, save_checkpoint, save_tsc
from ella_kd.samplers import SAMPLERS, SCHEDULES
from filing import Edit, Networks, editor, small_networks
from mixtures import Guided, Mixture
from tiny import randomised

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub, nor does a process that it starts
constants.HF_HUB_OFFLINE = True
settings.register_profile(
    "ella_kd", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("ella_kd")

WORDS = ["<pad>", "</s>", "<unk>", *"a red blue circle square on the left right of".split()]


@pytest.fixture
def float64() -> Iterator[None]:
    """Default dtype float64: k-diffusion's helpers build tensors of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()


@pytest.fixture
def guided() -> Guided:
    return Guided()


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipeline.load's arguments: pictures of 16 px, sizes in multiples of 8, context width 64, T5 width 32."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    unet = randomised(UNet(UNetConfig(4, 4, 32, (1, 2), 1, (True, True), 64, 2)), 0, 0.12)
    vae = AutoencoderKL(VAEConfig(channels=32, channel_mult=(1, 1, 1), num_res_blocks=1))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), hidden_size=64, intermediate_size=64,
                                        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=12,
                                        bos_token_id=0, eos_token_id=1, pad_token_id=0))
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, num_heads=2, d_ff=32, num_layers=1))
    save_checkpoint(folder / "sd.safetensors", unet, vae, clip, {"modelspec.resolution": "16x16"})
    save_tsc(folder / "tsc.safetensors", randomised(TSC(32, 32, 64, 1, 2, 4, 32), 1))
    t5.save_pretrained(folder / "t5")
    tokenizer().save_pretrained(folder / "t5")
    tokenizer().save_pretrained(folder / "clip")
    return {"checkpoint": str(folder / "sd.safetensors"), "tsc": str(folder / "tsc.safetensors"),
            "t5": str(folder / "t5"), "clip_tokenizer": str(folder / "clip")}


@pytest.fixture
def pipeline(tiny_files: dict[str, str]) -> Pipeline:
    return Pipeline.load(tiny_files["checkpoint"], tsc=tiny_files["tsc"], t5=tiny_files["t5"],
                         clip_tokenizer=tiny_files["clip_tokenizer"], device="cpu")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def networks() -> Networks:
    return small_networks()


@pytest.fixture(scope="session")
def saved(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, as `save_checkpoint` writes it."""
    path = tmp_path_factory.mktemp("saved") / "sd.safetensors"
    save_checkpoint(path, *networks, {"title": "small"})
    return path


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Edit:
    return editor(saved, tmp_path / "edited.safetensors")


@pytest.fixture
def files(tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA, an embedding, a ControlNet and a picture of edges, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, pipeline)
    return tmp_path


@pytest.fixture
def tables() -> Iterator[None]:
    """What a text registers is gone after it."""
    both: tuple[dict[str, Any], ...] = SAMPLERS, SCHEDULES
    before = [(table, dict(table)) for table in both]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)
