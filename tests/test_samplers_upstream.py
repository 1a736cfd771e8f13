"""upstream.py hands out the real k-diffusion, leaves no fake module behind, and says what to install without it."""

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from ella_kd.samplers import upstream


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hands_out_the_real_functions_and_leaves_no_fake_module() -> None:
    printed = in_a_fresh_python(
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


def test_an_importable_k_diffusion_is_used_as_it_is(tmp_path: Any) -> None:
    package = tmp_path / "k_diffusion"
    package.mkdir()
    for name in ("__init__", "sampling", "external", "utils"):
        (package / f"{name}.py").write_text("mine = True\n")
    printed = in_a_fresh_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from ella_kd.samplers.upstream import k_diffusion
        print(k_diffusion().sampling.mine, k_diffusion().sampling is sys.modules["k_diffusion.sampling"])
        """
    )
    assert printed == "True True"


@pytest.mark.parametrize("error", ["ImportError('clip')", "RuntimeError('operator torchvision::nms does not exist')"])
def test_a_k_diffusion_that_does_not_import_is_loaded_in_part(tmp_path: Any, error: str) -> None:
    package = tmp_path / "k_diffusion"
    package.mkdir()
    (package / "__init__.py").write_text(f"from . import layers\nraise {error}\n")
    (package / "layers.py").write_text("")
    (package / "utils.py").write_text("from torchvision.transforms import functional as TF\nmine = True\n")
    (package / "sampling.py").write_text("from . import utils\n")
    (package / "external.py").write_text("from . import sampling, utils\n")
    (tmp_path / "torchvision.py").write_text(f"raise {error}\n")
    printed = in_a_fresh_python(
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


def test_a_missing_requirement_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = in_a_fresh_python(
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


def test_the_rest_of_the_package_does_not_load_it() -> None:
    printed = in_a_fresh_python(
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
