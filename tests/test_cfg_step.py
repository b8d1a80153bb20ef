"""The sampling step's PyTorch reference: what each pass sees, guidance, and modalities that wait or have arrived."""

import sys

import pytest
import torch
from denoisers import initial_noise

from engine.kernels.cfg_step import (
    BatchConstants,
    cfg_step,
    cost,
    example_inputs,
    init_state,
    new_state,
    write_inputs,
)
from engine.kernels.philox import DROP_STREAM, STATE_STREAM, normals
from engine.kernels.step_table import NOOP_STEP, Coefficient, PassKind, StepColumn

# Two modalities: number 0 has two tokens with two channels, number 1 has one token with three: N = 7, L = 3.
MODALITY = torch.tensor([0, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
TOKEN = torch.tensor([0, 0, 1, 1, 2, 2, 2])
TOKEN_MODALITY = torch.tensor([0, 0, 1], dtype=torch.int32)
GENERATE = torch.tensor([True, True, False, False, True, True, True])
TOKEN_GENERATE = torch.tensor([True, False, True])
KNOWN, NULL = torch.arange(7.0) + 10, torch.arange(7.0) + 100
TIME, KNOWN_TIME, DROP_TIME = 7, 0, 9
MASKED = PassKind.GUIDES | PassKind.DROPS_KNOWN
EMPTY = PassKind.GUIDES | PassKind.NULLS_KNOWN
DROPPED = PassKind.DROPS_KNOWN | PassKind.DROPS_STATE  # guides nothing
ONLY_0, ONLY_1 = (MASKED, DROPPED), (DROPPED, MASKED)  # guide one modality alone


def line(kinds=(), time=TIME, known_time=KNOWN_TIME, drop_time=DROP_TIME, noop=False, **coefficients):
    """One modality's entry of a step table: by default the step that puts f into the state."""
    values = {"KNOWN_ALPHA": 1, "Q": 1, "B": 1, "W": 1} | coefficients
    row = NOOP_STEP if noop else [values.get(column.name, 0.0) for column in Coefficient]
    return row, [time, known_time, drop_time, 0, 1, *kinds]


def one_sample(*lines, generate=GENERATE, token_generate=TOKEN_GENERATE, seed=5):
    """(constants, state) of one sample whose table has these lines, each one entry per modality."""
    off = line([PassKind.OFF] * (len(lines[0][0][1]) - StepColumn.PASS), 0, 0, 0, noop=True)
    table = [*lines, (off, off)]
    constants = BatchConstants(
        torch.tensor([seed]), generate[None], KNOWN[None], NULL[None], MODALITY, token_generate[None], TOKEN_MODALITY,
        torch.tensor([[[entry[0] for entry in entries] for entries in table]]),
        torch.tensor([[[entry[1] for entry in entries] for entries in table]], dtype=torch.int32),
    )  # fmt: skip
    state = new_state(constants)
    for tensor in state[1:-1]:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -5)
    state.step.fill_(77)
    init_state(constants, state)
    return constants, state


def one_step(*passes, **options):
    """One sample of one step; `passes` are the extra passes' kinds, one for both modalities or a pair."""
    kinds = [kind if isinstance(kind, tuple) else (kind, kind) for kind in passes]
    masks = {name: options.pop(name) for name in ("generate", "token_generate") if name in options}
    return one_sample([line([kind[m] for kind in kinds], **options) for m in range(2)], **masks)


def eta(number, seed=5):
    return normals(torch.tensor([seed]), torch.tensor([0]), DROP_STREAM + number, 7)[0][0]


def test_each_pass_sees_what_its_kinds_say():
    _, state = one_step(MASKED, EMPTY, ONLY_0, ONLY_1, PassKind.OFF)
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
        assert torch.equal(state.inputs[number], values), number
    assert state.times.tolist() == [
        [TIME, KNOWN_TIME, TIME],
        [TIME, DROP_TIME, TIME],
        [TIME, KNOWN_TIME, TIME],
        [TIME, DROP_TIME, DROP_TIME],
        [DROP_TIME, DROP_TIME, TIME],
        [TIME, KNOWN_TIME, TIME],
    ]


def test_dropping_the_state_leaves_the_known_part_unless_that_is_dropped_too():
    _, state = one_step(PassKind.DROPS_STATE, PassKind.DROPS_STATE | PassKind.NULLS_KNOWN)
    assert torch.equal(state.inputs[1], torch.where(GENERATE, eta(0), KNOWN))
    assert torch.equal(state.inputs[2], torch.where(GENERATE, eta(1), NULL))
    assert state.times.tolist()[1:] == [[DROP_TIME, KNOWN_TIME, DROP_TIME]] * 2


def test_noise_wins_over_null_values_where_a_pass_asks_for_both():
    _, state = one_step(EMPTY | PassKind.DROPS_KNOWN)
    assert torch.equal(state.inputs[1][~GENERATE], eta(0)[~GENERATE])


def test_renoised_known_values_share_their_noise_across_passes_and_differ_from_the_state_noise():
    _, state = one_step(PassKind.OFF, EMPTY, KNOWN_ALPHA=0.5, KNOWN_SIGMA=2.0)
    known = ~GENERATE
    xi = normals(torch.tensor([5]), torch.tensor([0]), STATE_STREAM, 7)[1][0]
    assert torch.equal(state.inputs[0][known], (0.5 * KNOWN + 2.0 * xi)[known])
    assert torch.equal(state.inputs[1], state.inputs[0])
    assert torch.equal(state.inputs[2][known], (0.5 * NULL + 2.0 * xi)[known])


def test_a_token_with_any_generated_element_has_the_states_time():
    generate = torch.tensor([False, True, False, False, False, False, False])
    _, state = one_step(MASKED, generate=generate, token_generate=torch.tensor([True, False, False]))
    assert state.times.tolist() == [[TIME, KNOWN_TIME, KNOWN_TIME], [TIME, DROP_TIME, DROP_TIME]]


def test_every_modality_has_its_own_times():
    known = torch.tensor([True, False, False])  # no token of modality 1 is generated
    entries = line([DROPPED], time=3, known_time=4, drop_time=5), line([MASKED], time=6, known_time=7, drop_time=8)
    _, state = one_sample(entries)
    assert state.times.tolist() == [[3, 4, 6], [5, 5, 6]]
    _, state = one_sample(entries, generate=known[TOKEN], token_generate=known)
    assert state.times.tolist() == [[3, 4, 7], [5, 5, 8]]


def test_every_modality_has_its_own_noise_of_the_known_part():
    entries = line(KNOWN_ALPHA=0.5, KNOWN_SIGMA=2.0), line(KNOWN_ALPHA=0.25, KNOWN_SIGMA=0.0)
    nothing = torch.zeros(7, dtype=torch.bool)
    _, state = one_sample(entries, generate=nothing, token_generate=nothing[:3])
    xi = normals(torch.tensor([5]), torch.tensor([0]), STATE_STREAM, 7)[1][0]
    expected = torch.where(MODALITY == 0, 0.5 * KNOWN + 2.0 * xi, 0.25 * KNOWN)
    assert torch.equal(state.inputs[0], expected)


def test_two_passes_combine_as_classifier_free_guidance():
    constants, state = one_step(MASKED, W=3.0)
    f_c, f_u = torch.randn(1, 7), torch.randn(1, 7)
    cfg_step(torch.cat([f_c, f_u]), constants, state)
    expected = f_u + 3.0 * (f_c - f_u)
    torch.testing.assert_close(state.state[:, GENERATE], expected[:, GENERATE])


def test_a_pass_per_modality_guides_that_modality_only():
    constants, state = one_step(ONLY_0, ONLY_1, W=3.0)
    f = torch.randn(3, 7)
    cfg_step(f, constants, state)
    expected = f[0] + 2.0 * torch.where(MODALITY == 0, f[0] - f[1], f[0] - f[2])
    torch.testing.assert_close(state.state[0, GENERATE], expected[GENERATE])


def test_every_modality_has_its_own_guidance_scale():
    constants, state = one_sample([line([MASKED], W=3.0), line([MASKED], W=5.0)])
    f = torch.randn(2, 7)
    cfg_step(f, constants, state)
    expected = f[0] + torch.where(MODALITY == 0, 2.0, 4.0) * (f[0] - f[1])
    torch.testing.assert_close(state.state[0, GENERATE], expected[GENERATE])


def test_one_pass_is_enough_where_the_others_are_off():
    constants, state = one_step(PassKind.OFF, PassKind.OFF)
    f = torch.randn(1, 7)
    cfg_step(f, constants, state)
    assert torch.equal(state.state[0, GENERATE], f[0, GENERATE])


def test_every_coefficient_does_its_part_in_its_own_modality():
    """Three steps of all columns, against the formula in float64."""
    draw = torch.Generator().manual_seed(0)
    names = [column.name for column in Coefficient]
    values = torch.rand(3, 2, len(names), generator=draw).tolist()  # [step][modality][column]
    steps = [[line([MASKED], **dict(zip(names, entry, strict=True))) for entry in entries] for entries in values]
    constants, state = one_sample(*steps)
    x, x0_prev, x0_prev2 = state.state.double(), *torch.zeros(2, 1, 7, dtype=torch.float64)
    for step in range(3):
        f = torch.randn(2, 7, generator=draw)
        cfg_step(f, constants, state)
        _, _, p, q, a, b, c, d, e, w, _ = (constants.coefficients[0, step, MODALITY.long()].double()).unbind(1)
        z, _ = normals(torch.tensor([5]), torch.tensor([step + 1]), STATE_STREAM, 7)
        x0 = p * x + q * (f[1].double() + w * (f[0].double() - f[1].double()))
        x = torch.where(GENERATE, a * x + b * x0 + c * x0_prev + d * z + e * x0_prev2, KNOWN.double())
        x0_prev, x0_prev2 = x0, x0_prev
        torch.testing.assert_close(state.state.double(), x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.x0_prev.double(), x0, rtol=1e-5, atol=1e-5)


def test_poison_in_the_prediction_of_known_elements_goes_nowhere():
    constants, state = one_step(MASKED, W=3.0)
    cfg_step(torch.where(GENERATE, 1.0, float("nan")).repeat(2, 1), constants, state)
    assert torch.equal(state.state[0, ~GENERATE], KNOWN[~GENERATE])
    assert state.state.isfinite().all() and state.inputs.isfinite().all()


N_STEPS = 1000  # the time of pure noise


def waiting(kind=PassKind.DROPS_KNOWN):
    return line([kind], time=N_STEPS, noop=True)


def arrived(kind=DROPPED):
    return line([kind], time=0, drop_time=N_STEPS, noop=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1.0])
def test_modalities_that_wait_or_have_arrived_keep_their_state_bit_for_bit(poison):
    """Modality 0 moves while 1 waits, then 1 moves while 0 has arrived: at no step do both."""
    moving = line([MASKED], W=2.0)
    constants, state = one_sample([moving, waiting()], [moving, waiting()], [arrived(), moving], [arrived(), moving])
    for resting in (MODALITY == 1, MODALITY == 1, MODALITY == 0, MODALITY == 0):
        before = state.state.clone()
        cfg_step(torch.where(resting, poison, torch.randn(2, 7)), constants, state)
        after = state.state
        assert torch.equal(after[:, resting].view(torch.int32), before[:, resting].view(torch.int32))
        assert not torch.equal(after[:, GENERATE & ~resting], before[:, GENERATE & ~resting])
        assert all(tensor.isfinite().all() for tensor in (state.state, state.x0_prev, state.inputs))


def test_a_waiting_modality_is_noise_at_n_and_an_arrived_one_is_clean_at_0_until_dropped():
    moving = line([MASKED])
    constants, state = one_sample([moving, waiting()], [arrived(), moving])
    x = state.state.clone()
    assert state.times.tolist() == [[TIME, KNOWN_TIME, N_STEPS], [TIME, DROP_TIME, N_STEPS]]
    assert torch.equal(state.inputs[1, MODALITY == 1], x[0, MODALITY == 1])
    cfg_step(torch.randn(2, 7), constants, state)
    assert state.times.tolist() == [[0, KNOWN_TIME, TIME], [N_STEPS, N_STEPS, TIME]]
    assert torch.equal(state.inputs[0], state.state[0])
    assert torch.equal(state.inputs[1], torch.where(MODALITY == 0, eta(0), state.state[0]))


def test_a_waiting_modality_starts_from_its_initial_noise():
    waits = [[line(), line(noop=True)]] * 3
    constants, state = one_sample(*waits, [line(noop=True), line(P=1.0, Q=0.5)])
    for _ in range(3):
        cfg_step(torch.randn(1, 7), constants, state)
    f = torch.randn(1, 7)
    cfg_step(f, constants, state)
    expected = initial_noise(torch.tensor([5]), 7) + 0.5 * f
    torch.testing.assert_close(state.state[:, MODALITY == 1], expected[:, MODALITY == 1])


def test_one_modality_waits_one_moves_and_one_has_arrived():
    prediction, constants, state = example_inputs(2, ((3, 2), (4, 3), (2, 5)), passes=2, steps=3)
    constants.coefficients[:, :, [0, 2]] = torch.tensor(NOOP_STEP)
    constants.coefficients[:, 0, 1] = torch.tensor(line(P=0.0)[0])
    constants.indices[:, :, 0, StepColumn.TIME], constants.indices[:, :, 2, StepColumn.TIME] = N_STEPS, 0
    init_state(constants, state)
    before, resting = state.state.clone(), constants.modality != 1
    cfg_step(torch.where(resting, float("nan"), prediction), constants, state)
    assert torch.equal(state.state[:, resting], before[:, resting])
    expected = torch.where(constants.generate, prediction[:2], constants.known)
    assert torch.equal(state.state[:, ~resting], expected[:, ~resting])
    for modality, time in ((0, N_STEPS), (2, 0)):
        mine = constants.token_generate & (constants.token_modality == modality)
        assert (state.times[:2][mine] == time).all()


def test_a_sample_past_its_table_stays_bit_for_bit_as_it_is():
    constants, state = one_step(MASKED, W=3.0)
    cfg_step(torch.randn(2, 7), constants, state)
    done = state.state.clone()
    for _ in range(3):
        cfg_step(torch.randn(2, 7), constants, state)
        assert torch.equal(state.state, done)


def test_inputs_can_be_written_again_for_a_state_that_was_changed_between_steps():
    prediction, constants, state = example_inputs(2, ((5, 3), (2, 7)), passes=3, steps=4)
    cfg_step(prediction, constants, state)
    before = type(state)(*(tensor.clone() for tensor in state))
    state.inputs.fill_(float("nan"))
    state.times.fill_(-1)
    write_inputs(constants, state)
    assert all(map(torch.equal, state, before))
    state.state[constants.generate] = 7.0
    write_inputs(constants, state)
    assert (state.inputs[:2][constants.generate] == 7).all()
    assert torch.equal(state.inputs[:2][~constants.generate], before.inputs[:2][~constants.generate])


def test_a_sample_becomes_the_same_whatever_shares_its_batch():
    prediction, constants, state = example_inputs(3, ((5, 3), (2, 7)), passes=3, steps=4)
    shared = {"modality", "token_modality"}
    one = BatchConstants(**{k: v if k in shared else v[1:2] for k, v in constants._asdict().items()})
    alone = new_state(one)
    init_state(one, alone)
    for _ in range(6):
        cfg_step(prediction, constants, state)
        cfg_step(prediction[1::3], one, alone)
        assert torch.equal(alone.state, state.state[1:2])
        assert torch.equal(alone.inputs, state.inputs[1::3]) and torch.equal(alone.times, state.times[1::3])


def test_off_the_cpu_a_step_can_be_captured_because_it_never_reads_a_tensor_on_the_host():
    """Tensors on the meta device have no values: any host read of one raises."""
    constants, state = one_step(MASKED, ONLY_0, W=3.0)
    constants, state = (type(tensors)(*(t.to("meta") for t in tensors)) for tensors in (constants, state))
    init_state(constants, state)
    cfg_step(torch.randn(3, 7).to("meta"), constants, state)


@pytest.mark.parametrize("lines, drawn", [
    ([{}, {}], set()),
    ([{"kinds": [DROPPED]}, {}], {DROP_STREAM}),
    ([{}, {"kinds": [PassKind.NULLS_KNOWN]}], set()),
    ([{"D": 0.3}, {}], {STATE_STREAM}),
    ([{}, {"KNOWN_SIGMA": 0.3}], {STATE_STREAM}),
])  # fmt: skip
def test_on_a_cpu_noise_is_drawn_only_where_the_table_uses_it_and_stays_where_it_is_the_same(lines, drawn, monkeypatch):
    constants, state = one_sample(*[[line(**{"kinds": [MASKED]} | options)] * 2 for options in lines])
    streams = set()

    def counted(seeds, draw, stream, size):
        streams.add(stream)
        return normals(seeds, draw, stream, size)

    monkeypatch.setattr(sys.modules[cfg_step.__module__], "normals", counted)
    cfg_step(torch.randn(2, 7), constants, state)
    assert streams == drawn
    before = state.inputs.clone()
    write_inputs(constants, state)
    assert torch.equal(state.inputs, before)


def test_example_inputs_are_samples_of_all_kinds():
    _, constants, state = example_inputs(8, ((5, 3), (2, 7)), passes=3, live=2, steps=12)
    kinds, noop = constants.indices[..., StepColumn.PASS :], torch.tensor(NOOP_STEP)
    waits = (constants.coefficients == noop).all(-1)  # [B, S + 1, M]
    assert waits[:, -1].all() and (kinds[:, -1] == PassKind.OFF).all() and (kinds[..., 1] == PassKind.OFF).all()
    assert set(kinds.unique().tolist()) == set(range(16))
    assert (waits[..., 0] != waits[..., 1]).any(), "modalities move alike"
    assert len(set(waits.all(-1).sum(1).tolist())) > 1, "all samples have tables of one length"
    token = torch.arange(7).repeat_interleave(torch.tensor([3] * 5 + [7] * 2))
    for i in range(8):
        assert constants.token_generate[i].tolist() == [bool(constants.generate[i, token == t].any()) for t in range(7)]
    assert state.state.isfinite().all()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_cost_counts_the_bytes_of_every_tensor_once(passes):
    prediction, constants, state = example_inputs(2, ((32, 16), (8, 64)), passes)
    _, moved = cost(2, 1024, 40, passes)
    masks = constants.generate, constants.token_generate, constants.modality, constants.token_modality
    nulls = (constants.null,) if passes > 1 else ()
    read = prediction, constants.known, *nulls, *masks, state.state, state.x0_prev
    written = state.state, state.x0_prev, state.inputs, state.times
    assert moved == sum(tensor.nbytes for tensor in (*read, *written))


def test_cost_counts_the_arithmetic_of_each_pass():
    per_element = [cost(2, 1024, 40, passes)[0] / 2048 for passes in (1, 2, 3)]
    # x̂0 3, update 7, known part 3, one Box-Muller pair 8; a pass more: guidance 4, null values 2, another pair
    assert per_element == [21, 35, 49]
