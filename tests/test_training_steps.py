"""`Stage`: what a step draws, reads, averages and leaves out; accumulation, learning rate, precision, curves."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_training import CONFIG, LONG, SAMPLES, draw, losses_of, module, outcome, stage_in, train_in

from engine.training.curve import plot_curve, smoothed
from engine.training.recipes import StageConfig
from engine.training.stage import Stage, noise_of


def test_every_sample_is_seen_once_per_epoch_in_changing_order(tmp_path):
    seen, stage = [], stage_in(tmp_path, replace(CONFIG, steps=10, batch=3))

    def noting(generator, indices):
        seen.extend(indices)
        return draw(generator, indices)

    stage.run(noting, losses_of(stage.module), 100)
    epochs = [seen[start : start + SAMPLES] for start in range(0, 30, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def gradients_of(stage):
    """The gradients that each step gives to the optimizer, filled in while the stage is trained."""
    gradients = []

    def note(*_):
        gradients.append(torch.cat([p.grad.flatten() for p in stage.module.parameters()]))

    stage.optimizer.register_step_pre_hook(note)
    return gradients


def test_micro_batches_add_up_to_the_batch(tmp_path):
    curves, gradients = [], []
    for accumulate in (1, 2, 4):
        # Adam and clipping ignore a constant factor of the gradient, so the gradients themselves are compared.
        stage = stage_in(tmp_path / str(accumulate), replace(CONFIG, accumulate=accumulate, clip=math.inf))
        gradients.append(gradients_of(stage))
        stage.run(draw, losses_of(stage.module), 100)
        curves.append([row["squared"] for row in stage.curve])
    for k in (1, 2):
        torch.testing.assert_close(gradients[k], gradients[0], rtol=1e-3, atol=1e-5)
        assert curves[k] == pytest.approx(curves[0], rel=1e-4)


def test_every_step_draws_other_random_numbers(tmp_path):
    stage, drawn = stage_in(tmp_path, replace(CONFIG, accumulate=2, steps=3)), []

    def noting(generator, indices):
        drawn.append(torch.rand(1, generator=generator).item())
        return draw(generator, indices)

    stage.run(noting, losses_of(stage.module), 100)
    assert len(set(drawn)) == len(drawn) == 3


def test_what_a_thread_draws_and_reads_a_step_ahead_gives_the_same_run(tmp_path):
    events = []

    def drawing(generator, indices):
        events.append(("draw", threading.current_thread() is threading.main_thread()))
        return draw(generator, indices)

    def reading(batch, part):
        return batch[0][part], batch[1][part], len(batch[1])

    def run_in(folder, steps):
        stage = Stage(folder, module(), replace(CONFIG, steps=steps), SAMPLES, torch.float32, ahead=True)

        def losses(inputs, sums, count):
            events.append(("losses", stage.step))
            error = stage.module(inputs)[:, 0] - sums
            return {"squared": error.square().sum() / count, "absolute": 0.1 * error.abs().sum() / count}

        stage.run(drawing, losses, 2, read=reading)
        return stage

    folder = tmp_path / "ahead"
    run_in(folder, 5)
    assert [step for what, step in events if what == "losses"] == [0, 1, 2, 3, 4]
    assert [main for what, main in events if what == "draw"] == [False] * 5  # none of a sixth step
    stage = run_in(folder, 8)
    assert outcome(stage) == outcome(train_in(tmp_path / "not ahead"))
    assert stage.train_step(draw, losses_of(stage.module)), "without the thread, which has ended"


def test_an_error_of_the_thread_that_reads_ends_the_run(tmp_path):
    def reading(batch, part):
        raise OSError("the disk is gone")

    stage = Stage(tmp_path, module(), CONFIG, SAMPLES, torch.float32, ahead=True)
    with pytest.raises(OSError, match="the disk is gone"):
        stage.run(draw, losses_of(stage.module), 2, read=reading)


def test_the_noise_of_a_sample_depends_on_the_seed_and_its_place_alone():
    whole = noise_of(7, slice(0, 64), 500)
    assert torch.equal(noise_of(7, slice(40, 64), 500), whole[40:]) and whole.dtype == torch.float32
    assert abs(whole.mean()) < 0.03 and abs(whole.std() - 1) < 0.03
    others = torch.cat([whole, noise_of(8, slice(0, 64), 500)])
    correlations = torch.corrcoef(others) - torch.eye(128)
    assert correlations.abs().max() < 0.25  # of 500 values: 0.045 is one standard deviation


def test_the_learning_rate_warms_up_stays_and_decays():
    config = StageConfig(steps=100, batch=1, learning_rate=2.0, warmup=10, decay=0.2)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[9:81]) == {2.0}
    assert rates[80:] == pytest.approx([0.1 * i for i in range(20, 0, -1)])
    flat = replace(config, warmup=0, decay=0.0)
    assert {flat.learning_rate_at(step) for step in range(100)} == {2.0}


def test_the_optimizer_follows_the_learning_rate(tmp_path):
    stage = stage_in(tmp_path)
    for step in range(3):
        stage.train_step(draw, losses_of(stage.module))
        assert {g["lr"] for g in stage.optimizer.param_groups} == {CONFIG.learning_rate_at(step)}


def test_only_matrices_have_weight_decay(tmp_path):
    stage = stage_in(tmp_path)
    decay = {p: g["weight_decay"] for g in stage.optimizer.param_groups for p in g["params"]}
    assert [decay[p] for p in stage.module.parameters()] == [CONFIG.weight_decay, 0.0, CONFIG.weight_decay, 0.0]


def test_training_lowers_the_loss(tmp_path):
    squared = [row["squared"] for row in train_in(tmp_path, LONG, save_every=1000).curve]
    assert sum(squared[-20:]) < 0.2 * sum(squared[:20])


def test_gradients_are_clipped(tmp_path):
    stage = stage_in(tmp_path, replace(CONFIG, clip=0.1))
    gradients = gradients_of(stage)
    stage.train_step(draw, losses_of(stage.module))
    assert gradients[0].norm().item() == pytest.approx(0.1, rel=1e-4)


def test_the_average_follows_the_weights_and_is_not_trained(tmp_path):
    stage = stage_in(tmp_path, replace(CONFIG, ema=0.3, steps=6))
    expected = [p.detach().clone() for p in stage.module.parameters()]
    for step in range(6):
        stage.train_step(draw, losses_of(stage.module))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, stage.module.parameters(), strict=True)
        ]
    torch.testing.assert_close([p.data for p in stage.average.parameters()], expected)
    assert not any(p.requires_grad for p in stage.average.parameters()) and not stage.average.training


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_values_that_are_not_finite_stop_the_stage_and_leave_the_last_state_intact(tmp_path, where):
    stage = stage_in(tmp_path)
    losses = losses_of(stage.module)

    def exploding(batch, part):
        parts = losses(batch, part)
        if stage.step == 5:
            zero = (stage.module[0].weight * 0).sum()
            # √0 is finite, its gradient is not
            parts["broken"] = zero + math.inf if where == "loss" else zero.square().sqrt()
        return parts

    with pytest.raises(FloatingPointError, match="step 5.*learning rate"):
        stage.run(draw, exploding, 1)
    assert all(p.isfinite().all() for p in stage.module.parameters())
    resumed = stage_in(tmp_path)
    assert resumed.step == 5 and all(p.isfinite().all() for p in resumed.module.parameters())


def test_bfloat16_computes_under_autocast_and_keeps_float32_weights(tmp_path):
    stage, dtypes = Stage(tmp_path, module(), CONFIG, SAMPLES, torch.bfloat16), []
    stage.module[2].register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    stage.train_step(draw, losses_of(stage.module))
    assert dtypes == [torch.bfloat16]
    assert {p.dtype for m in (stage.module, stage.average) for p in m.parameters()} == {torch.float32}


def test_float16_skips_a_step_that_overflows_and_lowers_its_scale(tmp_path):
    def train_to(step, folder):
        stage = Stage(folder, module(), replace(CONFIG, steps=6), SAMPLES, torch.float16)
        losses = losses_of(stage.module)
        while stage.step < step:
            factor = 1e30 if stage.step == 2 else 1e-3
            before = outcome(stage)[2]
            row = stage.train_step(draw, lambda *batch, f=factor: {name: f * x for name, x in losses(*batch).items()})
            stage.curve.append({"step": stage.step, **row})
            assert (outcome(stage)[2] == before) == (stage.step == 3)
            assert stage.scaler.get_scale() == (65536 if stage.step < 3 else 32768)
        stage.save()
        stage.files.finish()
        return stage

    train_to(3, tmp_path / "resumed")
    assert outcome(train_to(6, tmp_path / "resumed"))[2] == outcome(train_to(6, tmp_path / "whole"))[2]


def test_smoothing_is_unbiased_from_the_start():
    assert list(smoothed([3.0] * 20, 5)) == pytest.approx([3.0] * 20)
    assert list(smoothed([0.0, 1.0], 2))[1] == pytest.approx(2 / 3)  # weights ½·½ and ½, made to sum to 1


def test_a_curve_is_plotted(tmp_path):
    plot_curve([{"step": s, "a": 1 / s, "b": 2 / s} for s in range(1, 30)], tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
