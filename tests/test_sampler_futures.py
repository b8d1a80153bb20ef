"""Submitting samples: futures, cancelling, progress and closing, none of which disturbs anybody else."""

import concurrent.futures
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from denoisers import SECONDS, FunctionDenoiser, N, gated, sample, table

from engine.config import Modality, ModelConfig
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import InputError
from engine.sampling.batch import SampleSpec
from engine.sampling.sampler import Sampler

MODEL = ModelConfig((Modality("image", 3, 2, depth=0),), shared_depth=1, dim=64)
CLOSED = "this engine is closed"


def predict(inputs, times, outputs):
    return torch.tanh(inputs + 0.7 * inputs.roll(1, 1)) * torch.cos(times[:, :1] / 300)


def spec(seed, steps=3):
    return SampleSpec(seed, table(steps, 1), torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size))


def alone(*specs):
    return torch.cat([sample(FunctionDenoiser(predict), [one], MODEL) for one in specs])


@contextmanager
def running(buckets=(1, 2, 4, 8), function=predict):
    sampler = Sampler(FunctionDenoiser(function), MODEL, buckets=buckets)
    try:
        yield sampler
    finally:
        sampler.close()


# --- Futures and cancelling ----------------------------------------------------------------------------------------


def test_submitting_returns_before_anything_is_computed_and_samples_share_steps():
    with gated(predict, MODEL, 2) as (denoiser, sampler):
        first, second = sampler.submit([spec(1)]), sampler.submit([spec(2)])
        assert not first.done() and not second.done()
        denoiser.release()
        assert torch.equal(torch.cat([first.result(SECONDS), second.result(SECONDS)]), alone(spec(1), spec(2)))
        assert sum(denoiser.rows) <= 2 * (3 + 1)


def test_a_sample_that_is_cancelled_while_it_waits_is_never_computed():
    with gated(predict, MODEL, 1) as (denoiser, sampler):
        first, second, third = (sampler.submit([spec(seed)]) for seed in (1, 2, 3))
        denoiser.wait()
        assert second.cancel()
        denoiser.release()
        assert torch.equal(first.result(SECONDS), alone(spec(1)))
        assert torch.equal(third.result(SECONDS), alone(spec(3)))
        assert second.cancelled() and len(denoiser.rows) == 6 and sampler.finished == 2


def test_a_sample_that_is_cancelled_under_way_leaves_its_slot_before_the_next_step():
    with gated(predict, MODEL, 1, 2) as (denoiser, sampler):
        first, second = sampler.submit([spec(1, 5), spec(2, 5)]), sampler.submit([spec(3, 2)])
        denoiser.wait()
        assert first.cancel()
        denoiser.release()
        assert torch.equal(second.result(SECONDS), alone(spec(3, 2)))
        assert denoiser.rows == [2, 1, 1] and sampler.finished == 1


def test_a_sample_that_is_done_cannot_be_cancelled():
    with running() as sampler:
        future = sampler.submit([spec(1)])
        result = future.result(SECONDS)
        assert not future.cancel() and torch.equal(future.result(), result)


def test_who_waits_for_a_cancelled_future_is_told():
    with gated(predict, MODEL, 1) as (denoiser, sampler):
        under_way = sampler.submit([spec(1)])
        denoiser.wait()
        futures = [under_way, sampler.submit([spec(2)]), sampler.call(list, [1])]
        assert all(future.cancel() for future in futures)
        denoiser.release()
        assert len(concurrent.futures.wait(futures, SECONDS).done) == 3


def test_a_future_is_kept_where_its_sampler_is_not():
    for seed in range(20):
        future = Sampler(FunctionDenoiser(predict), MODEL, buckets=(1,)).submit([spec(seed)])
        assert torch.equal(future.result(SECONDS), alone(spec(seed)))


def test_samples_are_submitted_from_the_callbacks_of_others():
    with running() as sampler:
        futures = []
        first = sampler.submit([spec(1)], lambda done, total: futures.append(sampler.submit([spec(2)])))
        first.add_done_callback(lambda _: futures.append(sampler.submit([spec(3)])))
        assert torch.equal(first.result(SECONDS), alone(spec(1)))
        concurrent.futures.wait(futures, SECONDS)
        while len(futures) < 4:
            time.sleep(0.001)
        assert torch.equal(torch.cat([f.result(SECONDS) for f in futures]), alone(spec(2), spec(2), spec(2), spec(3)))


def test_samples_that_do_not_fit_are_refused_before_any_is_submitted():
    with running() as sampler:
        with pytest.raises(InputError, match="^table: "):
            sampler.submit([spec(1), SampleSpec(1, table(3, 2), torch.ones(6).bool(), torch.zeros(6))])
        assert sampler.run([spec(2)]).isfinite().all() and sampler.finished == 1


def test_a_thousand_cancels_at_random_moments_disturb_nobody():
    expected = {seed: alone(spec(seed, 1 + seed % 7)) for seed in range(40)}
    dice, cancelled, others = random.Random(0), 0, []
    with running() as sampler:
        for i in range(1000):
            seed = i % 40
            kept = [(n, sampler.submit([spec(n, 1 + n % 7)])) for n in ([seed] if i % 10 == 0 else [])]
            future = sampler.submit([spec(n, 1 + n % 7) for n in {seed, (7 * seed) % 40}])
            if dice.random() < 0.5:
                time.sleep(dice.random() * 0.004)
            cancelled += future.cancel()
            others += kept
        for seed, future in others:
            assert torch.equal(future.result(SECONDS), expected[seed]), seed
        before = sampler.forwards
        assert torch.equal(sampler.run([spec(5, 6)]), expected[5])
        assert sampler.forwards - before <= 6 + 1, "nothing else was left to compute but a step under way"
    assert cancelled > 300, "of those that were not done before"


def test_threads_that_run_and_cancel_at_once_get_their_own_results():
    expected = [alone(spec(seed, 4)) for seed in range(8)]

    def work(number):
        dice = random.Random(number)
        for _ in range(12):
            seed = dice.randrange(8)
            dropped = sampler.submit([spec(seed, 9)])
            assert torch.equal(sampler.run([spec(seed, 4)]), expected[seed])
            dropped.cancel()
        return True

    with running((1, 3)) as sampler, concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4), timeout=SECONDS))


def test_an_interrupted_run_cancels_its_samples():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        with gated(predict, MODEL, 1) as (denoiser, sampler):

            def interrupt():
                denoiser.wait()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                sampler.run([spec(1, 900)])
            assert len(denoiser.rows) == 1, "it does not wait for the step under way"
            denoiser.release()
            assert torch.equal(sampler.run([spec(2)]), alone(spec(2)))
            assert len(denoiser.rows) == 1 + 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_worker_s_own_thread_is_not_let_wait_for_itself():
    sampler = Sampler(FunctionDenoiser(predict), MODEL, buckets=(1,))  # not closed where it fails: that would hang
    future = sampler.submit([spec(1)], lambda done, total: sampler.run([spec(2)]))
    with pytest.raises(RuntimeError, match="own thread"):
        future.result(SECONDS)
    assert torch.equal(sampler.run([spec(3)]), alone(spec(3)))
    sampler.close()


# --- Progress ------------------------------------------------------------------------------------------------------


def test_what_progress_raises_ends_its_own_run_only():
    def fail(done, total):
        if done == 4:
            raise ZeroDivisionError("progress")

    with gated(predict, MODEL, 1, 2, 4) as (denoiser, sampler):
        failing, other = sampler.submit([spec(1, 9), spec(2, 9)], fail), sampler.submit([spec(3, 5)])
        denoiser.release()
        with pytest.raises(ZeroDivisionError, match="progress"):
            failing.result(SECONDS)
        assert torch.equal(other.result(SECONDS), alone(spec(3, 5)))
        assert denoiser.rows[-3:] == [1, 1, 1], "the failed run's samples left their slots"


def test_progress_tells_of_each_runs_own_steps_until_it_is_done():
    with gated(predict, MODEL, 4) as (denoiser, sampler):
        seen = [], []
        runs = [
            sampler.submit([spec(1, 2), spec(2, 3)], lambda *count: seen[0].append(count)),
            sampler.submit([spec(3, 4)], lambda *count: seen[1].append(count)),
        ]
        denoiser.release()
        concurrent.futures.wait(runs, SECONDS)
    assert seen == ([(2, 5), (4, 5), (5, 5)], [(1, 4), (2, 4), (3, 4), (4, 4)])


def test_progress_does_not_run_backwards_when_samples_start_again():
    seen, limit = [], [16]

    def limited(inputs, times, outputs):
        if len(inputs) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(inputs, times, outputs)

    def squeeze(done, total):
        seen.append(done)
        if len(seen) == 2:
            limit[0] = 4

    with running(function=limited) as sampler, pytest.warns(UserWarning, match="out of memory"):
        sampler.run([spec(i, 5) for i in range(8)], squeeze)
    assert seen == sorted(set(seen)) and seen[-1] == 40


# --- Closing -------------------------------------------------------------------------------------------------------


def test_closing_ends_everything_that_is_not_done_after_the_step_under_way():
    with gated(predict, MODEL, 1) as (denoiser, sampler):
        done = sampler.submit([spec(1, 1)])
        denoiser.wait()
        denoiser.release(1)
        done.result(SECONDS)
        futures = [sampler.submit([spec(2, 500)]), sampler.submit([spec(3, 500)]), sampler.call(list, [1])]
        denoiser.wait()
        closing = threading.Thread(target=sampler.close)
        closing.start()
        denoiser.release(1)
        closing.join(SECONDS)
        assert not closing.is_alive() and len(denoiser.rows) == 2 + (len(denoiser.rows) > 2)
        for future in futures[:2]:
            with pytest.raises(RuntimeError, match=CLOSED):
                future.result(SECONDS)
        assert futures[2].done()


def test_a_closed_sampler_refuses_samples_and_calls_and_closes_again():
    for used in (True, False):
        sampler = Sampler(FunctionDenoiser(predict), MODEL, buckets=(1,))
        if used:
            sampler.run([spec(1)])
        sampler.close()
        sampler.close()
        for post in (lambda s=sampler: s.submit([spec(1)]), lambda s=sampler: s.call(list, [1])):
            with pytest.raises(RuntimeError, match=CLOSED):
                post()


@pytest.mark.parametrize("where", ["progress", "callback"])
def test_a_sampler_can_be_closed_from_its_own_callbacks(where):
    with gated(predict, MODEL, 1) as (denoiser, sampler):
        closed = []

        def close(*_):
            sampler.close()
            closed.append(threading.current_thread())

        first = sampler.submit([spec(1)], close if where == "progress" else None)
        second = sampler.submit([spec(2, 900)])
        if where == "callback":
            first.add_done_callback(close)
        denoiser.release()
        assert len(concurrent.futures.wait([first, second], SECONDS).done) == 2
        assert closed and closed[0] is not threading.current_thread()
        with pytest.raises(RuntimeError, match=CLOSED):
            second.result()
        with pytest.raises(RuntimeError, match=CLOSED):
            sampler.submit([spec(3)])


# --- Previews ------------------------------------------------------------------------------------------------------


def test_a_preview_is_x0_where_the_sample_is_generated_and_the_known_values_elsewhere():
    alpha_bar, target, known = (
        torch.tensor(NoiseSchedule("cosine", N).alpha_bar),
        torch.arange(6.0),
        torch.full((6,), -5.0),
    )
    generate = torch.tensor([True] * 4 + [False] * 2)

    def oracle(inputs, times, outputs):
        """The v whose x̂0 is the target, whatever the state."""
        a = alpha_bar[times.max(1, keepdim=True).values.long()].float()
        return (a.sqrt() * inputs - target) / (1 - a).sqrt()

    seen = []
    with running(function=oracle) as sampler:
        specs = [SampleSpec(seed, table(steps, 1), generate, known) for seed, steps in ((1, 6), (2, 3))]
        sampler.submit(specs, preview=seen.append, preview_every=2).result(SECONDS)
    assert [[preview.position for preview in previews] for previews in seen] == [[0, 1], [0]], "none of a last step"
    for preview in [preview for previews in seen for preview in previews]:
        assert preview.modalities == {"image"}
        torch.testing.assert_close(preview.x0, torch.where(generate, target, known), rtol=0, atol=1e-4)
