"""The benchmarks themselves: timing in turns, right counts and metrics, reports that say what was not measured."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from train_cases import small_sample_sheets

from benchmarks import experiments, report
from benchmarks.descriptions import DESCRIPTIONS
from benchmarks.metrics import diversity, features_of
from benchmarks.race import Contender, Refusal, Replay, time_in_turns
from benchmarks.stored import read, rows_by_group
from benchmarks.sweeps import reconditioned
from benchmarks.test_handover import StepsInThisThread
from benchmarks.test_loop import PASSES, STEPS, products_of
from benchmarks.trials import read_data
from benchmarks.workloads import (
    equal_compute,
    equal_depth,
    equal_parameters,
    forward_inputs,
    parameters,
    plain_loop,
    random_denoiser,
    sampling_flops,
    specs_of,
    table_of,
)
from engine import checkpoint
from engine.checkpoint import BUILT_IN
from engine.config import DiffusionConfig, SamplingConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.metrics.features import feature_network
from engine.model.cost import forward_flops
from engine.presets import PRESETS
from engine.sampling.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "float32": 1e11, "bfloat16": 2e11}
COCO = PRESETS["coco256"].model
TINY = PRESETS["tiny"]


def test_contenders_take_turns_in_an_order_that_rotates(monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.race.ROUND_SECONDS", 0)
    contenders = {name: Contender(lambda n=name: calls.append(n)) for name in "abc"}
    timings = time_in_turns(contenders, CPU, seconds=0, least=4)
    rounds = ["".join(calls[-12:][i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert all(len(t.seconds) == 4 and t.peak_bytes is None for t in timings.values())


def test_short_calls_are_repeated_until_the_clock_can_tell_them_apart():
    count = [0]
    time_in_turns({"a": Contender(lambda: count.__setitem__(0, count[0] + 1))}, CPU, seconds=0, least=2)
    assert count[0] > 1000


def test_a_contender_that_computes_something_else_is_reported():
    right = torch.ones(3)
    assert Contender(lambda: right + 1e-7, lambda: right).mismatch() is None
    refusal = Contender(lambda: right + 1e-3, lambda: right).mismatch()
    assert "computes something else: relative error 0.001" in refusal and isinstance(refusal, Refusal)
    assert Contender(lambda: right * torch.nan, lambda: right).mismatch()


def test_a_replayed_clock_shows_the_times_that_were_measured():
    clock = Replay()
    call, seen = clock.play([0.25, 4.0]), []
    for _ in range(2):
        started = clock()
        call()
        seen.append(clock() - started)
    assert seen == [0.25, 4.0]


def test_contenders_can_be_timed_by_another_clock():
    ticks = iter(range(1000))
    timings = time_in_turns({"a": Contender(lambda: None)}, CPU, seconds=0, least=2, clock=lambda: float(next(ticks)))
    assert timings["a"].seconds == [1.0, 1.0] and timings["a"].median == 1.0


def test_what_a_contender_runs_within_is_entered_before_the_clock_starts():
    seen = []

    @contextmanager
    def within():
        seen.append("in")
        yield
        seen.append("out")

    contender = Contender(lambda: seen.append("run") or time.sleep(0.01), within=within)
    time_in_turns({"a": contender}, CPU, seconds=0, least=1)
    assert seen == ["in", "run", "out"] * (len(seen) // 3)


def test_sampling_flops_count_the_in_blocks_of_known_modalities_once():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    inputs, times = forward_inputs(TINY.model, 2, CPU)
    with FlopCounterMode(display=False) as once:
        features = {"text": denoiser.branch_features("text", inputs, times)}
    with FlopCounterMode(display=False) as step:
        denoiser(inputs, times, ("image",), features)
    expected = once.get_total_flops() + 5 * step.get_total_flops()
    assert TINY.model.modality("text").depth > 0 and sampling_flops(TINY, 2, 5, ("image",)) == expected
    diffusion = DiffusionConfig(conditioning="renoise", time_sampling="independent")
    renoise = replace(TINY, diffusion=diffusion, sampling=SamplingConfig())
    assert sampling_flops(renoise, 2, 5, ("image",)) == 5 * forward_flops(TINY.model, 2, ("image",))


def test_the_products_of_a_loop_are_all_of_its_flops():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    run = products_of(denoiser, TINY, batch=1)

    def onednn_flops(x, weight, *arguments, out_shape, **others):
        return 2 * math.prod(x) * out_shape[-1]

    mapping = {torch.ops.mkldnn._linear_pointwise: onednn_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    assert counter.get_total_flops() == STEPS * forward_flops(TINY.model, PASSES, ("image",), ("text",))


def test_all_loops_that_are_compared_make_the_same_samples():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    specs = specs_of(TINY, table_of(TINY, 3, GuidanceOptions(scale=3.0)), ("image",), 1)
    expected = Sampler(denoiser, TINY.model, buckets=[1]).run(specs)
    for calls in (1, PASSES):
        torch.testing.assert_close(plain_loop(denoiser, specs, CPU, ("image",), calls), expected)
    here = StepsInThisThread(denoiser, ("text",), CPU)
    for _ in range(2):  # the second run finds the memory of the first
        torch.testing.assert_close(here(specs), expected)


def test_models_are_equal_in_what_their_names_say():
    assert equal_depth(COCO).shared_depth == 17
    assert parameters(equal_parameters(COCO)) == pytest.approx(parameters(COCO), rel=0.04)
    assert forward_flops(equal_compute(COCO), 1) == pytest.approx(forward_flops(COCO, 1), rel=0.06)


def test_diversity_is_in_levels():
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 1.0)])
    assert diversity(images) == pytest.approx(127.5)


def test_features_are_those_of_the_levels(tmp_path):
    features = features_of(BUILT_IN / "image", CPU)
    levels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = feature_network(BUILT_IN / "image", CPU)(levels)
    torch.testing.assert_close(features(levels / 127.5 - 1), expected)


@pytest.fixture(scope="module", autouse=True)
def short_sheets():
    with small_sample_sheets(1):
        yield


@pytest.fixture
def emoji(tmp_path):
    """Five images to train on and three to test with, named in words that the built-in model knows."""
    names = ["red heart", "dog", "cat", "man running", "blue heart", "woman running", "tree", "sun"]
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((64, 64)).save(tmp_path / "images" / f"{i}.png")
    for file, ids in (("captions.json", range(5)), ("captions_test.json", range(5, 8))):
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
            "annotations": [{"image_id": i, "caption": names[i]} for i in ids],
        }
        (tmp_path / file).write_text(json.dumps(content))
    return tmp_path


def experiment(emoji, name, *options):
    arguments = ["--data", str(emoji), "--out", str(emoji / "runs"), "--results", str(emoji / "results")]
    machine = ["--device", "cpu", "--dtype", "float32", "--sampling-steps", "1"]
    return experiments.main([name, *arguments, *machine, *options])


TRAINED = ["--preset", "tiny", "--autoencoder", str(BUILT_IN / "image"), "--steps", "1", "--batch", "2"]


@pytest.mark.parametrize(
    "options, rows",
    [
        (["masking", "--ratios", "0.5", "1"], 6),
        (["guidance", "--scales", "1", "3"], 12),
        (["architecture", *TRAINED, "--models", "1", "5", "6"], 3),
        (["depths", *TRAINED, "--seeds", "0", "1"], 2),
        (["modalities", *TRAINED], 3),
        (["masking", *TRAINED, "--ratios", "0.5"], 3),
        (["approximations", *TRAINED], 15),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_an_experiment_stores_a_table_that_is_reported_with_plots(emoji, options, rows):
    assert experiment(emoji, *options) == 0
    preset = "tiny" if "tiny" in options else "emoji"
    stored = json.loads((emoji / "results" / f"experiment-{options[0]}-{preset}.json").read_text())
    assert len(stored["rows"]) == rows and stored["command"].startswith(
        f"python -m benchmarks.experiments {options[0]}"
    )
    plots = [f"experiment-{options[0]}-{preset}.png"]
    if "curve" in stored:  # its last point is the table's
        assert stored["curve"][-1]["image error"] == stored["rows"][-1]["image error"] > 0
        plots.append(f"experiment-{options[0]}-{preset}-training.png")
    assert report.main(["--results", str(emoji / "results"), "--out", str(emoji / "RESULTS.md")]) == 0
    for name in plots:
        with Image.open(emoji / "results" / name) as plot:
            plot.verify()
    text = (emoji / "TABLES.md").read_text()
    assert all(part in text for part in (DESCRIPTIONS[options[0]].title, *plots))


def test_of_a_single_split_no_image_is_both_trained_on_and_measured_on(emoji):
    (emoji / "captions_test.json").unlink()
    parsed = experiments.parse(["masking", "--data", str(emoji), "--out", str(emoji), "--count", "2"])
    data = read_data(experiments.options_of(parsed))
    trained, tested = ({item.image_id for item in items} for items in (data.train.items, [i for i, _ in data.test]))
    assert len(tested) == 2 and len(trained) == 3 and not trained & tested


def test_the_other_conditioning_keeps_the_network():
    loaded = checkpoint.load(BUILT_IN)
    other = reconditioned(loaded)
    assert (loaded.config.diffusion.conditioning, other.config.diffusion.conditioning) == ("clean", "renoise")
    assert other.network is loaded.network and other.codec("text").vocabulary == loaded.codec("text").vocabulary
    assert reconditioned(other).config.diffusion.conditioning == "clean"


def test_photos_are_measured_with_given_features(emoji):
    assert experiment(emoji, "depths", *TRAINED, "--features", str(BUILT_IN / "image")) == 0
    row = json.loads((emoji / "results" / "experiment-depths-tiny.json").read_text())["rows"][0]
    assert row["FD"] > 0 and 0 <= row["BLEU-4"] <= 1 and row["± FD"] == "one seed"


@pytest.mark.parametrize(
    "options, named",
    [
        (["architecture"], "--steps"),
        (["masking", "--ratios", "0"], "--ratios"),
        (["masking", "--count", "1"], "--count"),
        (["guidance", "--features", "x.py"], "--autoencoder"),
        (["guidance", "--checkpoint", "nowhere"], "--checkpoint: nowhere"),
        (["depths", "--steps", "0"], "--steps"),
        (["depths", "--features", "nowhere", "--autoencoder", str(BUILT_IN / "image"), "--steps", "1"], "--features"),
        (["architecture", "--models", "1", "7", "--steps", "1"], "--models"),
        (["masking", "--data", "nowhere"], "--data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_experiments_refuse_options_that_cannot_be_used(emoji, capsys, options, named):
    assert experiment(emoji, *options) == 2
    assert named in capsys.readouterr().err
    assert not (emoji / "results").exists()


@pytest.mark.slow
def test_a_benchmark_runs_and_its_stored_run_is_reported(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "-k", "cfg_step", "--seconds", "0.1",
               "--device", "cpu", "--dtype", "float32", "--benchmark-json", str(results / "run.json")]  # fmt: skip
    # pytest-benchmark stores nothing where it takes itself to be in a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cfg_step, 1 rows of 1024: checking engine (1 of 1)" in done.stdout
    stored = read(results / "run.json")
    assert stored["machine_info"]["engine"]["ceilings"]["float32"] > 1e9
    rows = [row for several in rows_by_group(stored).values() for row in several]
    assert rows and all(row["percent_of_copy"] > 0 for row in rows)
    assert [p.name for p in report.write(results, tmp_path / "RESULTS.md")][:2] == ["RESULTS.md", "TABLES.md"]
