"""Memory and time to load a checkpoint of full size: `python -m benchmarks.memory`, on the CPU, with random weights.

A process of its own makes each file, another loads it, so that neither's memory is in the other's way. Anonymous memory
is what the networks need; the resident peak counts the pages of the file too, which are mapped and which the system
takes back when it needs them.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GB = 1e9


def make(family: str, dtype: str, path: Path) -> None:
    """A file of that family with small random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from ella_kd.models import AutoencoderKL, UNet, UNetConfig, VAEConfig, save_checkpoint
    from ella_kd.pipeline import MINIATURE

    torch.manual_seed(0)
    if family == "t5":  # flan-t5-xl's encoder, with any tokenizer
        config = T5Config(d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, vocab_size=32128,
                          feed_forward_proj="gated-gelu")
        with torch.device("meta"):
            t5 = T5EncoderModel(config)
        filled(t5, dtype).save_pretrained(path, max_shard_size="20GB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINIATURE / "t5" / name, path)
        return
    clip_l = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                            num_attention_heads=12)
    big_g = CLIPTextConfig(vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                           num_attention_heads=20, projection_dim=1280)
    xl = UNetConfig(channel_mult=(1, 2, 4), depth=(0, 2, 10), context_dim=2048, num_heads=None, head_dim=64,
                    linear_proj=True, middle_depth=10, vector_dim=2816)
    with torch.device("meta"):
        first = CLIPTextModel(clip_l)
        second = CLIPTextModelWithProjection(big_g) if family == "sdxl" else None
        unet = UNet(xl if family == "sdxl" else UNetConfig())
        vae = AutoencoderKL(VAEConfig(scale=0.13025) if family == "sdxl" else VAEConfig())
    for network in (first, second, unet, vae):
        if network is not None:
            filled(network, dtype)
    save_checkpoint(path, unet, vae, first, text_model_2=second)


def filled(network: Any, dtype: str) -> Any:
    network.to(DTYPES[dtype]).to_empty(device="cpu")
    for x in network.parameters():
        x.data.uniform_(-0.02, 0.02)
    return network


def load(path: Path, dtype: str) -> dict[str, float]:
    """Seconds and gigabytes that loading takes, beyond the process with all modules imported."""
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

    from ella_kd.models import T5TextEncoder, load_checkpoint

    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    before, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if path.is_dir():
        networks: list[Any] = [T5TextEncoder.from_folder(path, DTYPES[dtype]).model]
    else:
        parts = load_checkpoint(path, dtype=DTYPES[dtype], prediction="eps")
        networks = [parts.unet, parts.vae, parts.text_model, parts.text_model_2]
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    size = sum(x.numel() * x.element_size() for each in networks if each is not None for x in each.parameters())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "networks": size / GB, "anonymous": (peak[0] - before) / GB, "resident": resident / GB}


def anonymous() -> float:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *words], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", default="sd15", choices=["sd15", "sdxl", "t5"])
    parser.add_argument("--file", default="fp16", choices=DTYPES, help="the dtype in the file")
    parser.add_argument("--as", nargs="+", default=list(DTYPES), choices=DTYPES, dest="loaded", help="loaded dtypes")
    parser.add_argument("--folder", type=Path, help="where the file is written for the while; it takes 2 to 14 GB")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        return make(asked.family, asked.file, asked.make)
    if asked.load:
        return print(json.dumps(load(asked.load, asked.dtype)))
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / ("t5" if asked.family == "t5" else "random.safetensors")
        run("--family", asked.family, "--file", asked.file, "--make", str(path))
        size = sum(file.stat().st_size for file in [path, *path.glob("*")] if file.is_file())
        print(f"{asked.family}, a file of {size / GB:.2f} GB in {asked.file}; {machine()}\n")
        print("| as | networks | anonymous memory, peak | resident, peak | seconds |\n|---|---|---|---|---|")
        for dtype in asked.loaded:
            seen = json.loads(run("--load", str(path), "--dtype", dtype).splitlines()[-1])
            print(f"| {dtype} | {seen['networks']:.2f} GB | {seen['anonymous']:.2f} GB | {seen['resident']:.2f} GB | "
                  f"{seen['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
