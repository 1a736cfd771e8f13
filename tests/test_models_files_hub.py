"""Parts by name: paths, the hub, presets. The hub is an HTTP server of the test; nothing reaches outside."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.utils import _cache_assets
from PIL import Image

from ella_kd import Pipeline, generate
from ella_kd.cli import main
from ella_kd.models.files import hashes, presets
from ella_kd.models.files.choose import Chosen, choose
from ella_kd.models.files.hub import cached, find, find_all, with_preset
from ella_kd.models.files.presets import HubFile, Part, Preset
from ella_kd.pipeline import MINIATURE
from hub_server import COMMIT, Hub, serving

WEIGHTS = bytes(range(256)) * 400
SHA = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repository org/sd, and an empty cache."""
    with serving() as server:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        server.files["org/sd"] = {"sd.safetensors": WEIGHTS, "README.md": b"hello", "config.json": b"{}"}
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def preset(monkeypatch: pytest.MonkeyPatch, **parts: HubFile) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", Preset("a test", parts))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["org/sd", "org/sd:sd.safetensors", "org/sd@main:sd.safetensors",
                                  f"org/sd@{COMMIT}:sd.safetensors"])
def test_a_file_of_a_repository_is_fetched_once(hub: Hub, spec: str) -> None:
    path = find(spec)
    assert path.name == "sd.safetensors" and path.read_bytes() == WEIGHTS
    asked = len(hub.gets())
    assert asked == 1, "the one file, not the README"
    assert find(spec) == path and len(hub.gets()) == asked
    hub.asked.clear()
    assert find("org/sd:sd.safetensors" if "@" not in spec else spec) == path and not hub.asked, "no question at all"


def test_a_path_is_a_path(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/sd").mkdir()
    (tmp_path / "sd15").touch()
    for spec in ("org/sd", "sd15", tmp_path / "gone", "gone.safetensors", "a/b.ckpt", "/x/y", "../a/b", "./x", "../x",
                 "nowhere"):
        assert find(spec) == Path(spec)
    assert with_preset({"checkpoint": "sd15", "tsc": None})["checkpoint"] == "sd15" and not hub.asked


def test_a_name_said_as_a_name_is_the_preset(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "sd15").mkdir()
    for args in (["generate", "--model", "sd15", "--mode", "clip", "cat", "--device", "cpu"], ["download", "sd15"],
                 ["download", "sd15", "--part", "checkpoint"]):
        drawn = CliRunner().invoke(main, args)
        assert drawn.exit_code == 2 and "no repository" in drawn.output, drawn.output
        assert "/stable-diffusion-v1-5/stable-diffusion-v1-5" in hub.asked[-1]


def test_a_folder_is_its_config_its_tokenizer_and_one_set_of_weights(hub: Hub) -> None:
    names = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "README.md", "model.fp16.safetensors"]
    hub.files["google/t5"] = {f"t5/{name}": name.encode() for name in [*names, *others]} | {"x.safetensors": b""}
    folder = find("google/t5:t5", "t5")
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert hub.gets()[-1].split()[1].endswith(names[3]), "weights come last: a folder that has them is whole"
    (folder / names[3]).resolve().unlink()
    assert cached(HubFile("google/t5", "t5"), "t5") is None
    assert (find("google/t5:t5", "t5") / names[3]).read_bytes() == names[3].encode()


def weights(*folders: str, kind: str = "safetensors") -> list[str]:
    return [name for folder in folders for name in (f"{folder}/config.json", f"{folder}/model.{kind}")]


DIFFUSERS = ["model_index.json", *weights("unet", "vae", "text_encoder"), "tokenizer/vocab.json",
             "scheduler/scheduler_config.json"]


@pytest.mark.parametrize(("names", "path", "part", "chosen"), [
    ([*DIFFUSERS, "unet/model.bin", "unet/model.fp16.safetensors", "big.ckpt", "a.png", *weights("safety_checker")], "",
     "checkpoint", ("", DIFFUSERS)),
    (DIFFUSERS, "", "vae", ("vae", weights("vae"))),
    (DIFFUSERS, "", "text_encoder", ("text_encoder", weights("text_encoder"))),
    (DIFFUSERS, "", "clip_tokenizer", ("tokenizer", ["tokenizer/vocab.json"])),
    (DIFFUSERS, "vae/", "vae", ("vae", weights("vae"))),
    (["config.json", "vocab.json", "merges.txt", "model.safetensors"], "", "clip_tokenizer",
     ("", ["config.json", "merges.txt", "vocab.json"])),
    (["a/config.json", "a/model.fp16.safetensors"], "a", "t5", ("a", ["a/config.json", "a/model.fp16.safetensors"])),
    (["a.ckpt", "b.txt"], "", "checkpoint", ("a.ckpt", ["a.ckpt"])),
    (["a.safetensors", "b.safetensors"], "", "checkpoint", "several files: say which after a colon, a.safetensors, b"),
    (["a.safetensors"], "b.safetensors", "checkpoint", "holds no b.safetensors; it holds a.safetensors"),
    (["a.txt"], "", "tsc", "holds no weights"),
    (["config.json", "model-00001-of-00002.safetensors"], "", "t5", "some shards of its weights and not all"),
    ([*DIFFUSERS[:-4], "unet/config.json"], "", "clip_tokenizer", "holds no tokenizer"),
])
def test_what_a_repository_means(names: list[str], path: str, part: Part, chosen: tuple[str, list[str]] | str) -> None:
    if isinstance(chosen, str):
        with pytest.raises((ValueError, FileNotFoundError), match=chosen):
            choose(names, path, part)
    else:
        found = choose(names, path, part)
        assert (found.path, sorted(found.names)) == (chosen[0], sorted(chosen[1]))
        small = [name.endswith((".json", ".txt")) for name in found.names]
        assert isinstance(found, Chosen) and small == sorted(small, reverse=True)


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB: what is written at a time
    hub.breaks = [1000, 5000]
    assert find("org/sd:sd.safetensors").read_bytes() == WEIGHTS
    assert [line.rpartition(" ")[2] for line in hub.gets()][1:] == ["bytes=1000-", "bytes=6000-"]


def test_a_download_that_stays_broken_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = [10] + [0] * 20
    with pytest.raises(FileNotFoundError, match=r"could not be fetched from .* try again, or give a file .* --tsc"):
        find("org/sd:sd.safetensors", "tsc")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    hub.breaks.clear()
    assert find("org/sd:sd.safetensors").read_bytes() == WEIGHTS


def test_a_file_with_another_hash_is_not_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the table says, and as the hub says; read once, refused every time, right again once it is removed."""
    preset(monkeypatch, checkpoint=HubFile("org/sd", "sd.safetensors", sha256="0" * 64))
    read: list[Path] = []
    plain = hashes._read

    def reading(path: Path, size: int) -> str:
        read.append(path)
        return plain(path, size)

    monkeypatch.setattr(hashes, "_read", reading)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"is not used: its sha256 is {SHA}, expected {'0' * 64}.* remove"):
            find("tiny")
    assert len(read) == 1
    assert find("org/sd:sd.safetensors").read_bytes() == WEIGHTS and len(read) == 1, "asked for by name: the hub's hash"

    hub.files["org/vae"] = {"vae.safetensors": WEIGHTS}
    hub.lies["vae.safetensors"] = bad = WEIGHTS[::-1]
    with pytest.raises(ValueError, match=f"is {hashlib.sha256(bad).hexdigest()}, the hub says {SHA}") as told:
        find("org/vae:vae.safetensors")
    hub.lies.clear()
    Path(str(told.value).partition("remove ")[2].partition(" and")[0]).unlink()
    assert find("org/vae:vae.safetensors").read_bytes() == WEIGHTS


def test_a_hash_is_remembered_until_the_file_changes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert hashes.sha256(file) == hashlib.sha256(b"one").hexdigest()
    monkeypatch.setattr(hashes, "CHUNK", 0)  # a second reading would see nothing
    assert hashes.sha256(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert hashes.sha256(file) == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(("spec", "said"), [
    ("org/nothing", r"at org/nothing: it is no path here, and there is no repository http://[^ ]*/org/nothing"),
    ("org/sd@v9:sd.safetensors", "org/sd has no revision v9"),
    ("org/sd:sd.ckpt", r"org/sd holds no sd.ckpt; it holds sd.safetensors"),
    ("org/closed", "org/closed is gated: accept its terms there, then `hf auth login`"),
    ("org/a--b", "could not be fetched"),
    ("https://huggingface.co/org/sd", "is an address: of a file on the hub give org/repo:file"),
    ("sd-15", "no preset of that name: did you mean sd15"),
    ("flan-t5-xl", "the preset flan-t5-xl has no checkpoint, it has --t5"),
])
def test_what_cannot_be_found_is_said_in_one_line(hub: Hub, spec: str, said: str) -> None:
    hub.files["org/closed"] = {"sd.safetensors": b""}
    hub.gated.add("org/closed")
    with pytest.raises((FileNotFoundError, ValueError), match=said) as told:
        find(spec)
    assert "\n" not in str(told.value)
    if "closed" in spec:
        assert not list(Path("cache").rglob("*.safetensors"))


def test_without_a_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find("org/sd")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert find("org/sd") == path
    with pytest.raises(FileNotFoundError, match=r"fetched from http://127.0.0.1:9 \(ConnectError: .*refused"):
        find("org/other")


def test_offline_lists_what_is_missing(hub: Hub, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    preset(monkeypatch, checkpoint=HubFile("org/sd", "sd.safetensors", bytes=4_265_146_304),
           tsc=HubFile("org/ella", "a.bin"), t5=HubFile("org/ella", "t5"))
    with pytest.raises(FileNotFoundError) as told:
        Pipeline.load("tiny")
    assert str(told.value).startswith(
        "HF_HUB_OFFLINE is set and the cache lacks org/sd:sd.safetensors (4.27 GB) for --checkpoint, org/ella:a.bin "
        "for --tsc, org/ella:t5 for --t5. Fetch them once without it, `ella-kd download tiny`; or copy "
        "models--org--sd, models--org--ella from another machine's cache into ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    here = find("tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find("tiny") == here == find("org/sd")
    with pytest.raises(FileNotFoundError, match=r"lacks org/ella:a\.bin for --tsc, org/ella:t5 for --t5"):
        find_all(with_preset({"checkpoint": "tiny"}))
    with pytest.raises(FileNotFoundError, match="no connector at org/x: it is no path here, and HF_HUB_OFFLINE is set"):
        find("org/x", "tsc")
    assert len(hub.gets()) == 1


def test_a_full_disk(hub: Hub, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"in {tmp_path / 'cache'}: free some, or set HF_HOME") as told:
            find("org/sd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.errno == errno.EFBIG
    assert find("org/sd").read_bytes() == WEIGHTS


def test_a_preset_gives_what_is_not_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_miniature(hub)
    preset(monkeypatch, checkpoint=HubFile("org/mini", "sd.safetensors"), tsc=HubFile("org/mini", "tsc.safetensors"),
           t5=HubFile("org/mini", "t5"))
    drawn = CliRunner().invoke(main, ["download", "tiny"])
    assert drawn.exit_code == 0 and [Path(line).name for line in drawn.stdout.split()] == ["sd.safetensors",
                                                                                         "tsc.safetensors", "t5"]
    listed = CliRunner().invoke(main, ["models"]).stdout
    assert "tiny              here     a test" in listed and "sd15              missing  Stable" in listed
    asked = len(hub.asked)
    assert repr(Pipeline.load("tiny", dtype="float32")) == repr(Pipeline.load(
        MINIATURE / "sd.safetensors", tsc=MINIATURE / "tsc.safetensors", t5=MINIATURE / "t5"))
    assert with_preset({"checkpoint": "mine.ckpt", "t5": None}, "tiny") == {"checkpoint": "mine.ckpt", "tsc": "tiny",
                                                                           "t5": "tiny"}
    assert len(hub.asked) == asked


def serve_miniature(hub: Hub) -> None:
    hub.files["org/mini"] = {path.relative_to(MINIATURE).as_posix(): path.read_bytes()
                             for path in MINIATURE.rglob("*") if path.is_file()}


def test_as_a_user_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    files = ["org/mini:sd.safetensors", "org/mini:tsc.safetensors", "org/mini:t5"]
    with serving() as hub:
        serve_miniature(hub)
        place = {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": hub.url,
                 "HF_HUB_OFFLINE": "0", "TQDM_POSITION": "-1"}  # the last one: a bar without a terminal
        fetched = subprocess.run([sys.executable, "-m", "ella_kd", "download", *files], cwd=tmp_path, text=True,
                                 capture_output=True, check=False, env={**os.environ, **place})
    assert fetched.returncode == 0 and "100%" in fetched.stderr, fetched.stderr
    assert Path(fetched.stdout.splitlines()[0]).read_bytes() == (MINIATURE / "sd.safetensors").read_bytes()
    prompt = "A red heart sits in the center."
    named = [word for pair in zip(["--checkpoint", "--tsc", "--t5"], files) for word in pair]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))  # what that process has left
    drawn = CliRunner().invoke(main, ["generate", prompt, "--steps", "2", "--seed", "1", *named])
    assert drawn.exit_code == 0, drawn.stderr
    [picture] = generate(Pipeline.miniature(), prompt, steps=2, seeds=1, progress=False)
    assert Image.open(tmp_path / drawn.stdout.strip()).tobytes() == picture.image.tobytes()


def test_a_folder_keeps_its_own_tokenizer(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save(tmp_path / "folder")
    given: list[object] = []
    monkeypatch.setattr("ella_kd.models.files.hub._fetch", lambda *_: tmp_path / "folder")
    monkeypatch.setattr("ella_kd.options.find_clip_tokenizer", lambda: tmp_path / "another")
    monkeypatch.setattr(Pipeline, "load", lambda **files: given.append(files["clip_tokenizer"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    CliRunner().invoke(main, ["generate", "a", "--mode", "clip", "--checkpoint", "org/folder", "--device", "cpu",
                              "--out", str(tmp_path)])
    assert given == [None]
