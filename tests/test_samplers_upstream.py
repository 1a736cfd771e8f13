"""upstream.py hands out the real k-diffusion, leaves no fake module behind, and says what to install without it."""

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ella_kd.samplers import upstream

Fresh = Callable[[str], str]
SERVER = """
import os, sys, traceback
import ella_kd.samplers.upstream
for line in sys.stdin:
    if os.fork() == 0:
        code = 0
        try:
            exec(eval(line), {"__name__": "__main__"})
        except BaseException:
            code = traceback.print_exc(file=sys.stdout) or 1
        sys.stdout.flush()
        os._exit(code)
    failed = os.wait()[1] != 0
    print("failed" if failed else "done", end="\\n\\0\\n", flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """Runs code in a fork of a fresh Python that has imported ella_kd, once for all, and returns what it prints."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None

    def run(code: str) -> str:
        print(repr(textwrap.dedent(code)), file=server.stdin, flush=True)
        *printed, end = iter(server.stdout.readline, "\0\n")  # type: ignore[union-attr]
        assert end == "done\n", "".join(printed)
        return "".join(printed).strip()

    yield run
    server.stdin.close()
    server.wait()


def test_hands_out_the_real_functions_and_leaves_no_fake_module(fresh: Fresh) -> None:
    printed = fresh(
        """
        import sys, types
        from ella_kd.samplers.upstream import k_diffusion
        modules = k_diffusion()
        assert modules is k_diffusion()
        for module in (modules.sampling, modules.external, modules.utils):
            assert module.__file__.replace("\\\\", "/").split("/")[-2] == "k_diffusion", module.__file__
        assert modules.external.sampling is modules.sampling
        # A module without a file or a spec is one that somebody made up; only the private package itself may be so.
        made_up = [n for n, m in sys.modules.items() if n.split(".")[0] in ("torchvision", "k_diffusion", "clip")
                   and (getattr(m, "__spec__", None) is None)]
        print(made_up, modules.sampling.sample_dpmpp_2m.__name__, modules.external.CompVisDenoiser.__name__)
        """
    )
    assert printed == "[] sample_dpmpp_2m CompVisDenoiser"


def test_an_importable_k_diffusion_is_used_as_it_is(tmp_path: Any, fresh: Fresh) -> None:
    package = tmp_path / "k_diffusion"
    package.mkdir()
    for name in ("__init__", "sampling", "external", "utils"):
        (package / f"{name}.py").write_text("mine = True\n")
    printed = fresh(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from ella_kd.samplers.upstream import k_diffusion
        print(k_diffusion().sampling.mine, k_diffusion().sampling is sys.modules["k_diffusion.sampling"])
        """
    )
    assert printed == "True True"


@pytest.mark.parametrize("error", ["ImportError('clip')", "RuntimeError('operator torchvision::nms does not exist')"])
def test_a_k_diffusion_that_does_not_import_is_loaded_in_part(tmp_path: Any, error: str, fresh: Fresh) -> None:
    package = tmp_path / "k_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text(f"from . import layers\nraise {error}\n")
    (package / "layers.py").write_text("")
    (package / "utils.py").write_text("from torchvision.transforms import functional as TF\nmine = True\n")
    (package / "sampling.py").write_text("from . import utils\n")
    (package / "external.py").write_text("from . import sampling, utils\n")
    (tmp_path / "torchvision.py").write_text(f"raise {error}\n")
    printed = fresh(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from ella_kd.samplers.upstream import k_diffusion
        print(k_diffusion().external.utils.mine)
        print([name for name in sys.modules if name.split(".")[0] in ("k_diffusion", "torchvision")])
        try:
            k_diffusion().utils.TF.to_tensor(None)
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert printed.splitlines() == ["True", "[]", "this helper of k-diffusion needs torchvision"]


def test_absent_k_diffusion_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.k_diffusion.cache_clear()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "k_diffusion" else real(name))
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps k-diffusion==0\.1\.1\.post1"):
        upstream.k_diffusion()


def test_a_missing_requirement_is_named(fresh: Fresh) -> None:
    printed = fresh(
        """
        import sys
        sys.modules["torchdiffeq"] = None
        from ella_kd.samplers.upstream import k_diffusion
        try:
            k_diffusion()
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert "pip install torchdiffeq" in printed


def test_the_rest_of_the_package_does_not_load_it(fresh: Fresh) -> None:
    printed = fresh(
        "import sys, ella_kd.samplers; print([n for n in sys.modules if 'k_diffusion' in n or n == 'torchdiffeq'])"
    )
    assert printed == "[]"


def test_external_denoisers_work() -> None:
    class Inner(torch.nn.Module):
        alphas_cumprod = torch.linspace(0.999, 0.01, 10)

        def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return x * 0 + cond

    denoiser = upstream.k_diffusion().external.CompVisDenoiser(Inner())
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(denoiser(x, torch.tensor([2.0]), cond=torch.tensor(0.25)), x - 0.5)
