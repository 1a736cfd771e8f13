from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ella_kd import ELLA, Concat, Conditioning, Constant
from ella_kd.conditioning import Plan, Stack
from ella_kd.models.text import TextFeatures
from tiny import FEATURES, LATENTS, WIDTH, PointwiseTSC, features, noise, relative, row, tiny_tsc

T = torch.tensor([961.73, 0.0, 420.5])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
KINDS = st.sampled_from(["ella", "clip", "ella + clip"])


def clip(*lengths: int, seed: int = 7) -> Constant:
    return Constant(features(*lengths, seed=seed, width=WIDTH))


def conditioning(kind: str, lengths: list[int], tsc: object, seed: int = 2) -> Conditioning:
    ella = ELLA(tsc, features(*lengths, seed=seed))  # type: ignore[arg-type]
    return {"ella": ella, "clip": clip(*lengths, seed=seed), "ella + clip": Concat(ella, clip(77, seed=seed))}[kind]


def timesteps(*t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float32)


@settings(max_examples=30)
@given(LENGTHS)
def test_a_batch_of_mixed_lengths_equals_its_prompts_alone(lengths: list[int]) -> None:
    tsc, text, t = tiny_tsc(), features(*lengths), torch.linspace(0, 999, len(lengths))
    batch = ELLA(tsc, text)(t)
    assert batch.tokens.shape == (len(lengths), LATENTS, WIDTH)
    assert batch.mask is None
    for i in range(len(lengths)):
        assert relative(batch.tokens[i:i + 1], ELLA(tsc, row(text, i))(t[i:i + 1]).tokens) < 1e-5


def plan_of(*t: float) -> Plan:
    """A plan whose levels are the timesteps themselves."""
    return Plan(t, timesteps(*t), t)


def planned_at(conditioning: Conditioning, plan: Plan, t: float) -> Conditioning:
    return conditioning.map(lambda leaf: leaf.planned(plan)).at((t,))


@settings(max_examples=30)
@given(KINDS, LENGTHS)
def test_planned_equals_unplanned(kind: str, lengths: list[int]) -> None:
    exact, plan = conditioning(kind, lengths, tiny_tsc()), plan_of(*T.tolist())
    for t in T:
        decided = planned_at(exact, plan, float(t))
        assert decided.rows == exact.rows == len(lengths)
        a, b = decided(t.repeat(len(lengths))), exact(t.repeat(len(lengths)))
        assert relative(a.tokens, b.tokens) < 1e-5
        assert (a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask)  # type: ignore[arg-type]


@given(st.lists(st.tuples(KINDS, st.integers(1, 9)), min_size=1, max_size=4), st.sampled_from([1, 5, 1 << 24]))
def test_all_that_share_a_connector_are_planned_in_few_calls(kinds: list[tuple[str, int]], read: int) -> None:
    """One call where it fits, bitwise what each says alone, wherever a run begins; and never more rows than fit."""
    tsc, plan = PointwiseTSC(), plan_of(5, 7, 9)
    ones: list[Conditioning] = []
    for i, (kind, length) in enumerate(kinds):
        ella, clip = ELLA(tsc, features(length, seed=i)), Constant(features(length, width=2))  # type: ignore[arg-type]
        ones.append({"ella": ella, "clip": clip, "ella + clip": Concat(ella, clip)}[kind])
    for one in ones:
        one.map(lambda leaf: leaf.planned(plan))
    prompts = sum(kind != "clip" for kind, _ in kinds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ella_kd.conditioning.plan.READ", read * 9 * FEATURES)
        got = {t: [planned_at(one, plan, t)(timesteps(t)).tokens for one in ones] for t in (7, 5, 7, 9)}
    if read > 99:
        assert tsc.calls == ([3 * prompts] if prompts else [])  # wherever the run begins
    assert max(tsc.calls, default=0) <= max(read * 9, 1)
    for t, tokens in got.items():
        for one, shown in zip(ones, tokens):
            assert torch.equal(one(timesteps(t)).tokens, shown)


def test_answers_of_the_past_are_given_up_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tsc, plan = PointwiseTSC(), plan_of(*range(40))
    monkeypatch.setattr("ella_kd.conditioning.plan.KEPT", 2 * 2 * 10)  # ten timesteps of two prompts' two numbers
    monkeypatch.setattr("ella_kd.conditioning.plan.READ", 2 * 4 * 4 * FEATURES)
    one = ELLA(tsc, features(4, 4))  # type: ignore[arg-type]
    for t in range(40):
        assert torch.equal(planned_at(one, plan, t)(timesteps(t, t)).tokens, one(timesteps(t, t)).tokens)
        assert len(plan.table(tsc).answers) <= 10


def test_many_pictures_of_one_prompt_cost_one_row_per_timestep() -> None:
    tsc = PointwiseTSC()
    for shown, rows in ((ELLA(tsc, features(4)), 3), (ELLA(tsc, features(4, 2)).repeat(8), 6)):  # type: ignore[arg-type]
        tsc.calls.clear()
        assert planned_at(shown.repeat(8), plan_of(*T.tolist()), float(T[0])).rows == 8 * shown.rows
        assert tsc.calls == [rows]


@pytest.mark.parametrize("kind", ["ella", "clip", "ella + clip"])
def test_repeat_puts_the_samples_of_a_prompt_side_by_side(kind: str) -> None:
    one = conditioning(kind, [4, 2], tiny_tsc())
    plain, t = one(T[:1].repeat(2)), T[:1].repeat(6)
    plan, first = plan_of(*T.tolist()), float(T[0])
    late = one.map(lambda leaf: leaf.planned(plan)).repeat(3).at((first,))
    for many in (one.repeat(3), planned_at(one, plan, first).repeat(3), planned_at(one.repeat(3), plan, first), late):
        assert many.rows == 6
        assert relative(many(t).tokens, plain.tokens[[0, 0, 0, 1, 1, 1]]) < 1e-5
        assert plain.mask is None or torch.equal(many(t).mask, plain.mask[[0, 0, 0, 1, 1, 1]])  # type: ignore[arg-type]
    both = Stack(one, one).repeat(3)
    assert both(T[:1].repeat(12)).tokens.shape[0] == 12


def test_planning_keeps_gradients_where_the_caller_has_them() -> None:
    tsc = tiny_tsc().requires_grad_(True)
    assert planned_at(ELLA(tsc, features(4)), plan_of(7), 7)(T).tokens.requires_grad
    with torch.no_grad():
        assert not planned_at(ELLA(tsc, features(4)), plan_of(7), 7)(T).tokens.requires_grad


@settings(max_examples=30)
@given(KINDS, KINDS, LENGTHS, st.integers(1, 9))
def test_stack_masks_what_it_pads(first: str, second: str, lengths: list[int], length: int) -> None:
    """Attention over the stacked tokens equals attention over each conditioning's own."""
    tsc, b = tiny_tsc(), len(lengths)
    parts = conditioning(first, lengths, tsc), conditioning(second, [length], tsc, seed=9)
    t = torch.full((b,), 500.0)
    stacked = Stack(parts[0], parts[1].repeat(b))(t.repeat(2))
    query = noise(2 * b, 1, 6, WIDTH)

    def attend(tokens: Tensor, mask: Tensor | None, q: Tensor) -> Tensor:
        keys = tokens[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, keys,
                                                                None if mask is None else mask[:, None, None])

    got = attend(stacked.tokens, stacked.mask, query)
    alone = [part(t) for part in parts]
    expected = torch.cat([attend(c.tokens, c.mask, q) for c, q in zip(alone, query.split(b))])
    assert relative(got, expected) < 1e-5
    same = alone[0].tokens.shape == alone[1].tokens.shape
    assert (stacked.mask is None) == (same and alone[0].mask is None and alone[1].mask is None)


def test_concat_puts_ella_first_and_keeps_masks() -> None:
    ella, plain = ELLA(tiny_tsc(), features(4, 2)), clip(3, 1)
    context = Concat(ella, plain)(T[:2])
    assert torch.equal(context.tokens[:, :LATENTS], ella(T[:2]).tokens)
    assert torch.equal(context.tokens[:, LATENTS:], plain(T[:2]).tokens)
    assert context.mask is not None
    assert context.mask.tolist() == [[True] * LATENTS + [True] * 3, [True] * LATENTS + [True, False, False]]
    assert Concat(ella, clip(3))(T[:2]).mask is None


def test_fixed_mode_attends_to_every_position() -> None:
    """Without a mask the padding counts, as ELLA was trained; beside masked prompts it becomes all True."""
    tsc, padded = tiny_tsc(), TextFeatures(features(9, 3).tokens)
    fixed = ELLA(tsc, padded)
    assert relative(fixed(T[:2]).tokens, tsc(padded.tokens, T[:2])) == 0
    assert relative(ELLA(tsc, features(9, 3))(T[:2]).tokens, fixed(T[:2]).tokens) > 1e-3
    plan, other = plan_of(7), ELLA(tsc, features(12, 1))
    other.planned(plan), fixed.planned(plan)
    assert relative(planned_at(fixed, plan, 7)(T[:2]).tokens, fixed(timesteps(7, 7)).tokens) < 1e-5


def test_conditionings_are_values() -> None:
    tsc, text, own = tiny_tsc(), features(4, 2), features(3, 1, width=WIDTH)
    one = Concat(ELLA(tsc, text), Constant(own))
    tensors = [text.tokens, text.mask, own.tokens, own.mask, *tsc.parameters()]
    before = [x.clone() for x in tensors if x is not None]
    planned = planned_at(one, plan_of(7), 7)
    first = planned(T[:2])
    kept = first.tokens.clone()
    for use in (one, planned, one.repeat(2), planned.repeat(2)):
        use(T[:1].repeat(use.rows))
        Stack(use, use)(T[:1].repeat(2 * use.rows))
    first.tokens.zero_()  # not even by whoever was given the tokens
    assert torch.equal(planned(T[:2]).tokens, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, (x for x in tensors if x is not None), strict=True))
    with pytest.raises(FrozenInstanceError):
        one.parts = ()


def test_one_row_fits_every_batch_and_others_must_match() -> None:
    tsc = tiny_tsc()
    for one in (ELLA(tsc, features(4)), clip(3), Concat(ELLA(tsc, features(4)), clip(3))):
        for use in (one, planned_at(one, plan_of(7), 7)):
            assert use(T).tokens.shape[0] == 3
            for wrong in (use.repeat(2), use.repeat(4)):
                with pytest.raises(ValueError, match=f"has {wrong.rows} rows and the batch 3"):
                    wrong(T)


def test_bad_combinations() -> None:
    with pytest.raises(ValueError, match=r"Concat takes .* got rows \[2, 3\]"):
        Concat(clip(3, 3), clip(3, 3, 3))
    with pytest.raises(ValueError, match=r"got rows \[\]"):
        Concat()
    with pytest.raises(ValueError, match=r"one width, got \[24, 768\]"):
        Concat(ELLA(tiny_tsc(), features(4)), Constant(features(3, width=768)))(T)
    with pytest.raises(ValueError, match=r"one width, got \[24, 12\]"):
        Stack(clip(3), Constant(features(3, width=FEATURES)))(T[:2])
