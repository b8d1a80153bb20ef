import pytest
import torch

from engine.kernels.cfg_step import (
    DROP_STREAM,
    IDENTITY,
    STATE_STREAM,
    Coefficient,
    Guided,
    Progress,
    Rows,
    begin,
    cfg_step,
    cost,
    initial_noise,
    normals,
    philox_4x32,
)

# Random123's published known-answer vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, result):
    assert philox_4x32(words(counter), words(key)) == words(result)


def many(seed=3, draw=0, stream=0, size=200_000):
    return normals(torch.tensor([seed]), torch.tensor([draw]), stream, size)


def test_normals_have_the_moments_of_a_standard_normal():
    for values in many():
        values = values[0].double()
        assert abs(values.mean()) < 0.01
        assert abs(values.var() - 1) < 0.02
        assert abs((values**3).mean()) < 0.03
        assert abs((values**4).mean() - 3) < 0.1
        assert values.isfinite().all()


def test_normals_are_independent_across_element_draw_stream_seed_and_each_other():
    first, second = many()
    others = [
        second, first.roll(1, 1), many(seed=4)[0], many(seed=3 + 2**32)[0], many(draw=1)[0], many(stream=1)[0],
        many(draw=1, stream=1)[0],
    ]  # fmt: skip
    for other in others:
        correlation = (first * other).mean()
        assert abs(correlation) < 0.01, correlation
        assert not torch.equal(first, other)


def test_all_64_bits_of_a_seed_count_and_its_sign_bit_is_a_bit():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**40])
    noise = initial_noise(seeds, 64)
    assert noise.isfinite().all()
    assert len({tuple(row) for row in noise.tolist()}) == len(seeds)


def test_extreme_random_bits_give_finite_normals(monkeypatch):
    import engine.kernels.cfg_step as module

    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(module, "philox_4x32", lambda *_, word=word: (torch.tensor([[word]]),) * 4)
        for values in many(size=1):
            assert values.isfinite().all()


# Two modalities, "0" of two tokens with two channels and "1" of one token with three: N = 7, L = 3.
MODALITY = torch.tensor([0, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
TOKEN_MODALITY = torch.tensor([0, 0, 1], dtype=torch.int32)
GENERATE = torch.tensor([True, True, False, False, True, True, True])
TOKEN_GENERATE = torch.tensor([True, False, True])
KNOWN, NULL = torch.arange(7.0) + 10, torch.arange(7.0) + 100
TIME, KNOWN_TIME, DROP_TIME = 7, 0, 9


def one_row(codes, known_alpha=1.0, known_sigma=0.0, w=1.0, generate=GENERATE, token_generate=TOKEN_GENERATE, seed=5):
    """A batch of one row whose table is one step that leaves x̂0 = f in the state."""
    coefficients = torch.zeros(1, 2, len(Coefficient))
    values = {"KNOWN_ALPHA": known_alpha, "KNOWN_SIGMA": known_sigma, "Q": 1, "B": 1, "W": w}
    for name, value in values.items():
        coefficients[0, 0, Coefficient[name]] = value
    coefficients[0, 1] = torch.tensor(IDENTITY)
    indices = torch.tensor([[[TIME, KNOWN_TIME, DROP_TIME, 0, 1, *codes], [0, 0, 0, 0, 0, *[Guided.OFF] * len(codes)]]])
    rows = Rows(
        torch.tensor([seed]), generate[None], KNOWN[None], NULL[None], MODALITY, token_generate[None], TOKEN_MODALITY,
        coefficients, indices.int(),
    )  # fmt: skip
    passes = 1 + len(codes)
    poison = float("nan")
    progress = Progress(
        torch.tensor([77]), torch.full((1, 7), poison), torch.full((1, 7), poison), torch.full((passes, 7), poison),
        torch.full((passes, 3), -5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    begin(rows, progress)
    return rows, progress


def eta(number, seed=5):
    return normals(torch.tensor([seed]), torch.tensor([0]), DROP_STREAM + number, 7)[0][0]


def test_each_pass_sees_what_its_code_says():
    _, progress = one_row([Guided.MASKED, Guided.EMPTY, 0, 1, Guided.OFF])
    x = initial_noise(torch.tensor([5]), 7)[0]
    conditional = torch.where(GENERATE, x, KNOWN)
    expected = {
        0: conditional,
        1: torch.where(GENERATE, x, eta(0)),
        2: torch.where(GENERATE, x, NULL),
        3: torch.where(GENERATE & (MODALITY == 0), x, eta(2)),
        4: torch.where(GENERATE & (MODALITY == 1), x, eta(3)),
        5: conditional,
    }
    for number, values in expected.items():
        assert torch.equal(progress.inputs[number], values), number
    assert progress.times.tolist() == [
        [TIME, KNOWN_TIME, TIME],
        [TIME, DROP_TIME, TIME],
        [TIME, KNOWN_TIME, TIME],
        [TIME, DROP_TIME, DROP_TIME],
        [DROP_TIME, DROP_TIME, TIME],
        [TIME, KNOWN_TIME, TIME],
    ]


def test_renoised_known_values_share_their_noise_across_passes_and_differ_from_the_state_noise():
    _, progress = one_row([Guided.OFF, Guided.EMPTY], known_alpha=0.5, known_sigma=2.0)
    known = ~GENERATE
    xi = normals(torch.tensor([5]), torch.tensor([0]), STATE_STREAM, 7)[1][0]
    assert torch.equal(progress.inputs[0][known], (0.5 * KNOWN + 2.0 * xi)[known])
    assert torch.equal(progress.inputs[1], progress.inputs[0])
    assert torch.equal(progress.inputs[2][known], (0.5 * NULL + 2.0 * xi)[known])


def test_a_token_with_any_generated_element_has_the_states_time():
    generate = torch.tensor([False, True, False, False, False, False, False])
    _, progress = one_row([Guided.MASKED], generate=generate, token_generate=torch.tensor([True, False, False]))
    assert progress.times.tolist() == [[TIME, KNOWN_TIME, KNOWN_TIME], [TIME, DROP_TIME, DROP_TIME]]


def test_two_passes_combine_as_classifier_free_guidance():
    rows, progress = one_row([Guided.MASKED], w=3.0)
    f_c, f_u = torch.randn(1, 7), torch.randn(1, 7)
    cfg_step(torch.cat([f_c, f_u]), rows, progress)
    expected = f_u + 3.0 * (f_c - f_u)
    torch.testing.assert_close(progress.state[:, GENERATE], expected[:, GENERATE])


def test_a_pass_per_modality_guides_that_modality_only():
    rows, progress = one_row([0, 1], w=3.0)
    f = torch.randn(3, 7)
    cfg_step(f, rows, progress)
    expected = f[0] + 2.0 * torch.where(MODALITY == 0, f[0] - f[1], f[0] - f[2])
    torch.testing.assert_close(progress.state[0, GENERATE], expected[GENERATE])


def test_one_pass_is_enough_where_the_others_are_off():
    rows, progress = one_row([Guided.OFF, Guided.OFF])
    f = torch.randn(1, 7)
    cfg_step(f, rows, progress)
    assert torch.equal(progress.state[0, GENERATE], f[0, GENERATE])


def test_poison_in_the_prediction_of_known_elements_goes_nowhere():
    rows, progress = one_row([Guided.MASKED], w=3.0)
    cfg_step(torch.where(GENERATE, 1.0, float("nan")).repeat(2, 1), rows, progress)
    assert torch.equal(progress.state[0, ~GENERATE], KNOWN[~GENERATE])
    assert progress.state.isfinite().all() and progress.inputs.isfinite().all()


def test_a_row_past_its_table_stays_bit_for_bit_as_it_is():
    rows, progress = one_row([Guided.MASKED], w=3.0)
    cfg_step(torch.randn(2, 7), rows, progress)
    done = progress.state.clone()
    for _ in range(3):
        cfg_step(torch.randn(2, 7), rows, progress)
        assert torch.equal(progress.state, done)


def test_step_can_be_captured_because_it_never_reads_a_tensor_on_the_host():
    """Fake tensors have no values: any host read of one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows, progress = one_row([Guided.MASKED, 0], w=3.0)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        rows, progress = (type(t)(*map(mode.from_tensor, t)) for t in (rows, progress))
        begin(rows, progress)
        cfg_step(mode.from_tensor(torch.randn(3, 7)), rows, progress)


def test_cost_grows_with_passes_and_counts_every_tensor_once():
    flops, moved = cost(batch=2, size=8192, tokens=320, passes=2)
    assert cost(2, 8192, 320, 3) > (flops, moved)
    inputs_and_prediction = 2 * 2 * 2 * 8192 * 4
    assert inputs_and_prediction < moved < 3 * inputs_and_prediction
