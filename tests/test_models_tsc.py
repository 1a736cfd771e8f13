"""The connector against the published class (golden numbers in float64), its masks, lengths, dtypes and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from ella_kd.models import TSC, load_tsc
from ella_kd.models.attention import attend

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def golden() -> tuple[TSC, dict[str, Tensor]]:
    """The connector of the golden file in float64, and the file's tensors. Its AdaLN weights are not zero."""
    with safe_open(DATA / "tsc_reference.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tsc = TSC(**json.loads(file.metadata()["config"]))
    weights = {name.removeprefix("weight."): x for name, x in tensors.items() if name.startswith("weight.")}
    tsc.load_state_dict(weights)
    assert weights["connector.perceiver_blocks.0.ln_1.linear.weight"].std() > 0.01
    return tsc.double().requires_grad_(False), tensors


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> TSC:
    """A connector whose every parameter is random: fresh ones hide a swapped shift and scale."""
    torch.manual_seed(seed)
    tsc = TSC(time_channel=32, time_embed_dim=24, width=32, layers=2, heads=4, num_latents=6, input_dim=20)
    for parameter in tsc.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tsc.to(dtype).requires_grad_(False)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("case", range(5))
def test_equals_the_published_class(golden: tuple[TSC, dict[str, Tensor]], case: int) -> None:
    tsc, tensors = golden
    features, t, want = tensors["features"], tensors[f"t.{case}"], tensors[f"tokens.{case}"]
    assert error(tsc(features.double(), t), want) < 1e-13
    tsc.float()
    try:
        assert error(tsc(features, t.float()).double(), want) < 1e-5
    finally:
        tsc.double()


def test_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        tsc = TSC()
    want = json.loads((DATA / "ella_sd15_tsc_keys.json").read_text())
    assert {name: list(x.shape) for name, x in tsc.state_dict().items()} == want
    assert sum(x.numel() for x in tsc.parameters()) == 66_820_608


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_a_mask_equals_slicing(dtype: torch.dtype, tolerance: float) -> None:
    tsc, t = small(dtype=dtype), torch.tensor([3.5, 999.0, 480.25])
    features = torch.randn(3, 7, 20, dtype=dtype)
    lengths = [7, 1, 4]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    got = tsc(features, t, mask)
    for row, length in enumerate(lengths):
        alone = tsc(features[row : row + 1, :length], t[row : row + 1])
        assert error(got[row : row + 1], alone) < tolerance
    # and the padding does matter where no mask hides it, as in ELLA's fixed mode
    assert error(tsc(features, t)[1:2], got[1:2]) > 1e-2


def test_what_the_mask_hides_is_never_read() -> None:
    tsc, t = small(), torch.tensor([500.0])
    features = torch.randn(1, 5, 20)
    mask = torch.tensor([[True, True, True, False, False]])
    other = features.clone()
    other[:, 3:] = 100 * torch.randn(1, 2, 20)
    assert torch.equal(tsc(features, t, mask), tsc(other, t, mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_weighted_key_is_a_key_that_is_there_so_many_times(dtype: torch.dtype) -> None:
    """softmax with bias log w = softmax over w copies: a closed form for whole weights, 0 and 1 among them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, dtype=dtype) for n in (3, 5, 5))
    times = torch.tensor([[3, 1, 0, 2, 1], [1, 1, 5, 0, 1]])
    got = attend(q, k, v, 2, times.to(dtype))
    for row in range(2):
        ks, vs = (x[row : row + 1].repeat_interleave(times[row], 1) for x in (k, v))
        tolerance = 3e-3 if dtype == torch.float16 else 10 * torch.finfo(dtype).eps
        assert error(got[row : row + 1], attend(q[row : row + 1], ks, vs, 2)) < tolerance


def test_weights_of_one_and_zero_are_a_bool_mask() -> None:
    q, k, v = (torch.randn(2, n, 12) for n in (3, 5, 5))
    seen = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    assert error(attend(q, k, v, 2, seen.float()), attend(q, k, v, 2, seen)) < 1e-6
    assert error(attend(q, k, v, 2, torch.ones(2, 5)), attend(q, k, v, 2)) < 1e-6


@given(st.lists(st.floats(0, 50), min_size=4, max_size=4), st.integers(0, 2**32))
def test_attention_shares_are_multiplied_by_the_weights(weights: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 1, 2).double(), torch.randn(1, 5, 2).double(), torch.eye(5).double()[None]
    w = torch.tensor([[*weights, 1.0]], dtype=torch.float64)
    share = torch.softmax(q[0] @ k[0].T / 2**0.5, 1) * w
    assert error(attend(q, k, v, 1, w)[0], share / share.sum()) < 1e-12


def test_a_weighted_token_is_a_repeated_token_to_the_connector() -> None:
    tsc, t = small(dtype=torch.float64), torch.tensor([500.0])
    features = torch.randn(1, 4, 20, dtype=torch.float64)
    times = torch.tensor([[2, 1, 0, 3]])
    got = tsc(features, t, times.double())
    assert error(got, tsc(features.repeat_interleave(times[0], 1), t)) < 1e-13
    assert error(got, tsc(features, t)) > 1e-2
    half = tsc.half()(features.half(), t, times.half())
    assert half.dtype == torch.float16
    assert error(half.double(), got) < 2e-2
    tsc.double()


def test_a_batch_equals_singles_and_one_timestep_serves_all() -> None:
    tsc, features = small(dtype=torch.float64), torch.randn(3, 5, 20, dtype=torch.float64)
    t = torch.tensor([10.0, 500.5, 999.0])
    together = tsc(features, t)
    for row in range(3):
        assert error(together[row : row + 1], tsc(features[row : row + 1], t[row : row + 1])) < 1e-13
    assert error(tsc(features, t[1:2]), tsc(features, t[1:2].expand(3))) < 1e-13
    assert error(together[:1], together[1:2]) > 1e-2


def test_tokens_move_smoothly_with_a_fractional_timestep() -> None:
    tsc, features = small(dtype=torch.float64), torch.randn(1, 5, 20, dtype=torch.float64)
    near, mid, far = (tsc(features, torch.tensor([t])) for t in (961.0, 961.73, 962.0))
    assert 0 < error(near, mid) < 0.5 * error(near, tsc(features, torch.tensor([100.0])))
    assert error(mid, far) < error(near, far)


def test_a_half_network_still_sees_the_timestep_in_float32() -> None:
    """In bf16, 961 and 963 are the same number: were t cast before its sinusoid, the tokens would be equal."""
    tsc, features = small().bfloat16(), torch.randn(1, 5, 20)
    one, other = (tsc(features, torch.tensor([t])) for t in (961.0, 963.0))
    assert one.dtype == torch.bfloat16
    assert not torch.equal(one, other)


def test_a_fresh_connector_starts_where_the_published_one_did() -> None:
    torch.manual_seed(0)
    tsc = TSC(width=256, layers=1, num_latents=64, input_dim=64)
    assert abs(float(tsc.connector.latents.detach().std()) * 16 - 1) < 0.05
    for name, parameter in tsc.named_parameters():
        if ".ln_" in name:
            assert not parameter.any(), name


GOOD = {"features": torch.zeros(2, 5, 20), "t": torch.zeros(2), "mask": torch.ones(2, 5, dtype=torch.bool)}


@pytest.mark.parametrize(("change", "says"), [
    ({"features": torch.zeros(5, 20)}, r"features \[B, L, 20\], got \[5, 20\]"),
    ({"features": torch.zeros(2, 5, 21)}, r"features \[B, L, 20\], got \[2, 5, 21\]"),
    ({"t": torch.zeros(3)}, r"t \[2\].*got \[3\]"),
    ({"t": torch.tensor(1.0)}, r"t \[2\].*got \[\]"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be \[2, 5\], bool .* got torch.bool \[2, 4\]"),
    ({"mask": torch.ones(2, 5, dtype=torch.int64)}, r"bool .* or floats .* got torch.int64"),
    ({"mask": torch.full((2, 5), -0.5)}, r"at least 0 .* got -0.5 to -0.5"),
    ({"mask": torch.full((2, 5), torch.nan)}, "finite and at least 0"),
    ({"mask": torch.full((2, 5), torch.inf)}, "finite and at least 0"),
])
def test_wrong_input_is_refused(change: dict[str, Tensor], says: str) -> None:
    tsc = small()
    tsc(**GOOD)
    with pytest.raises(ValueError, match=says):
        tsc(**{**GOOD, **change})


@pytest.mark.parametrize("heads", [0, -4, 4.0, True, "4", None])
def test_heads_are_a_whole_number(heads: Any) -> None:
    """einops keeps what it worked out for 4.0 heads, and would take it for 4 heads later: those fail too."""
    with pytest.raises(ValueError, match="heads must be a whole number of at least 1, got"):
        TSC(width=32, heads=heads)


def test_a_short_repr() -> None:
    assert repr(small()) == "TSC(features of width 20 -> 6 tokens of width 32, 2 blocks, float32 on cpu)"


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="multiple of heads, got 30 and 8"):
        TSC(width=30)


def test_the_golden_connector_loads_from_its_own_file_format(tmp_path: Path,
                                                             golden: tuple[TSC, dict[str, Tensor]]) -> None:
    """A file without metadata, like the published one: the heads are 8, everything else comes from the shapes."""
    from safetensors.torch import save_file

    save_file({name: x.float() for name, x in golden[0].state_dict().items()}, tmp_path / "tsc.safetensors")
    tsc = load_tsc(tmp_path / "tsc.safetensors")
    assert (tsc.heads, tsc.input_dim, tsc.time_channel, len(tsc.connector.perceiver_blocks)) == (8, 40, 32, 3)
