"""In which order modalities are generated and how they are guided: `order`, `guidance`, `guidance_kind` and `eta`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import STEPS, assert_same, difference, left_half, noise
from PIL import Image

from engine import Engine, Request
from engine.checkpoint import load
from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.errors import InputError
from engine.kernels.philox import DROP_STREAM, STATE_STREAM, normals
from engine.model.denoiser import Denoiser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        yield engine


def with_config(checkpoint: Path, folder: Path, **changes: dict) -> Path:
    """A copy of a checkpoint folder whose config.json has other values: section={key: value}."""
    folder = shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    for section, values in changes.items():
        config[section] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def passes(network, counted: list[int]) -> None:
    """From now on appends the rows of each forward to `counted`."""
    network.shared_middle[0].register_forward_hook(lambda _, arguments, out: counted.append(len(out)))


# ------------------------------------------------------------------------------------------------- order


@torch.inference_mode()
def plain_ddim(checkpoint, seed: int, steps: int, stages: list[list[str]], w: float) -> dict[str, torch.Tensor]:
    """DDIM in plain loops, one for each stage, for a model of v-prediction and clean conditioning; tokens [1, L, C].

    While a stage moves, later modalities are pure noise at time N and earlier ones clean at time 0; they guide by being
    noise in a second pass. A text that others are generated from is that of the nearest words.
    """
    config, model = checkpoint.config.diffusion, checkpoint.config.model
    schedule, N, parts = NoiseSchedule(config.schedule, config.timesteps), config.timesteps, model.state_slices
    denoiser = Denoiser(checkpoint.network, N)
    seeds, zero = torch.tensor([seed]), torch.zeros(1, dtype=torch.int64)
    x = normals(seeds, zero, STATE_STREAM, model.size)[0]  # [1, N]
    dropped = normals(seeds, zero, DROP_STREAM, model.size)[0]
    time = {m.name: N for m in model.modalities}

    def predict(state: torch.Tensor, time: dict[str, int]) -> torch.Tensor:
        index = [torch.full((1, m.tokens), time[m.name], dtype=torch.int32) for m in model.modalities]
        return denoiser(state, torch.cat(index, dim=1))

    clean: list[str] = []
    for stage in stages:
        times = timesteps(N, steps)
        for t, s in zip(times, [*times[1:], 0], strict=True):
            f = predict(x, time | dict.fromkeys(stage, t))
            if clean:
                other = x.clone()
                for name in clean:
                    other[:, parts[name]] = dropped[:, parts[name]]
                f_u = predict(other, time | dict.fromkeys(stage, t) | dict.fromkeys(clean, N))
                f = f_u + w * (f - f_u)
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            x0 = alpha * x - sigma * f
            moved = float(schedule.alpha(s)) * x0 + float(schedule.sigma(s)) * (x - alpha * x0) / sigma
            for name in stage:
                x[:, parts[name]] = moved[:, parts[name]]
        if "text" in stage and stage != stages[-1]:
            codec, m = checkpoint.codec("text"), model.modality("text")
            words = decoded(codec, x[:, parts["text"]].unflatten(1, (m.tokens, m.channels)))
            x[:, parts["text"]] = codec.encode([codec.read(words, "text")]).flatten(1)
        time |= dict.fromkeys(stage, 0)
        clean += stage
    return {m.name: x[:, parts[m.name]].unflatten(1, (m.tokens, m.channels)) for m in model.modalities}


def decoded(codec, tokens: torch.Tensor):
    """What tokens [1, L, C] of a modality that was not given stand for."""
    (found,) = codec.decode(tokens, [codec.read(None, "value")])
    return found.value


TWO, THREE = "tiny_checkpoint", "three_modality_checkpoint"


@pytest.mark.parametrize(
    ("folder", "order", "stages"),
    [
        (TWO, "together", [["image", "text"]]),
        (TWO, None, [["text"], ["image"]]),
        (TWO, ("text", "image"), [["text"], ["image"]]),
        (TWO, ("image", "text"), [["image"], ["text"]]),
        (TWO, ["image"], [["image"], ["text"]]),
        (THREE, "together", [["image", "text", "sketch"]]),
        (THREE, None, [["text"], ["sketch"], ["image"]]),
        (THREE, ("sketch", "image", "text"), [["sketch"], ["image"], ["text"]]),
        (THREE, ["sketch"], [["sketch"], ["image", "text"]]),
    ],
)
def test_joint_generation_is_a_plain_loop_for_each_stage(request, folder, order, stages):
    checkpoint, w = load(request.getfixturevalue(folder)), 3.0 if len(stages) > 1 else 1.0
    with Engine(load(request.getfixturevalue(folder)), CPU, torch.float32) as engine:
        found = engine.generate(Request(seed=5, steps=4, solver="ddim", order=order, guidance=w))
    assert found.order == tuple(name for stage in stages for name in stage if len(stages) > 1)
    for name, tokens in plain_ddim(checkpoint, 5, 4, stages, w).items():
        value = decoded(checkpoint.codec(name), tokens)
        if name == "text":
            assert found.text == value
        else:
            assert difference(found.samples[0].outputs[name], value) <= 1


@pytest.mark.parametrize("solver", ["dpm++", "ddim"])
@pytest.mark.parametrize("prompt", [None, "red _", "_ _ _ _ _ _"])
def test_after_its_text_an_image_is_that_of_the_text(engine, solver, prompt):
    """To the last digit: what the image is generated from are the words, not what is near them."""
    same = {"seed": 4, "steps": STEPS, "solver": solver, "guidance": 2.0}
    joint = engine.generate(Request(prompt, num=2, **same))
    for i, sample in enumerate(joint.samples):
        drawn = engine.generate(Request(inputs={"text": sample.text}, **same | {"seed": 4 + i}))
        assert drawn.text == sample.text and difference(drawn.image, sample.image) <= 1


def test_the_default_is_the_checkpoint_s_order_and_its_guidance(engine):
    """Of joint samples, which in an order are guided by what came first, and unguided where all move at once."""
    default, explicit = engine.generate([Request(seed=1), Request(seed=1, order=("text", "image"), guidance=3.0)])
    assert (default.order, default.guidance) == (("text", "image"), 3.0)
    assert_same(default, explicit, rounding=0)
    together, unguided = engine.generate([Request(order="together"), Request(order="together", guidance=1.0)])
    assert (together.order, together.guidance) == ((), 1.0)
    assert_same(together, unguided, rounding=0)


@pytest.mark.parametrize(("order", "expected"), [([], ()), (["image", "text"], ("image", "text")), (["text"], None)])
def test_a_checkpoint_s_config_says_the_order(tiny_checkpoint, tmp_path, engine, order, expected):
    folder = with_config(tiny_checkpoint, tmp_path / "c", sampling={"order": order})
    with Engine.from_pretrained(folder, dtype="float32") as other:
        found = other.generate(Request(seed=2, steps=STEPS))
    expected = ("text", "image") if expected is None else expected
    assert found.order == expected
    assert_same(found, engine.generate(Request(seed=2, steps=STEPS, order=expected or "together")))


def test_a_checkpoint_s_config_says_the_guidance_of_each_task(tiny_checkpoint, tmp_path):
    scales = {"joint": 2.0, "text-to-image": 1.5, "image-to-text": 0.5}
    folder = with_config(tiny_checkpoint, tmp_path / "c", sampling={"guidance": scales})
    infilled = {"image": noise(), "mask": left_half()}
    given = [{}, {"order": "together"}, {"prompt": "red"}, {"image": noise()}, infilled, infilled | {"prompt": "red"}]
    requests = [Request(**one, steps=1) for one in given]
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        found = {(result.task, result.order): result.guidance for result in engine.generate(requests)}
        assert engine.generate(Request(prompt="red", guidance=4, steps=1)).guidance == 4.0
    assert found == {
        ("joint", ("text", "image")): 2.0,
        ("joint", ()): 1.0,
        ("text-to-image", ()): 1.5,
        ("image-to-text", ()): 0.5,
        ("infill", ("text", "image")): 3.0,  # not named: what masked guidance is generally good for
        ("infill", ()): 3.0,
    }


@pytest.mark.parametrize("given", [{"prompt": "red cat"}, {"image": noise()}], ids=["text-to-image", "image-to-text"])
def test_one_generated_modality_has_no_order(engine, given):
    expected = engine.generate(Request(**given, steps=STEPS))
    for order in ("together", ("text", "image"), ("image", "text"), ("text",)):
        found = engine.generate(Request(**given, steps=STEPS, order=order))
        assert found.order == () and found.task != "infill"
        assert_same(found, expected, rounding=0)


def test_what_is_partly_known_is_generated_in_order_too(engine):
    given = {"prompt": "red _", "image": noise(), "mask": left_half(), "steps": STEPS, "solver": "ddim"}
    requests = [Request(**given, order=order) for order in (None, ("text", "image"), ("image", "text"), "together")]
    default, text, image, together = engine.generate(requests)
    assert [r.order for r in (default, text, image, together)] == [text.order, ("text", "image"), ("image", "text"), ()]
    assert_same(default, text)
    assert difference(text.image, image.image) > 0 and difference(text.image, together.image) > 0


def test_what_comes_first_takes_one_pass_since_nothing_guides_it(tiny_checkpoint):
    checkpoint, rows = load(tiny_checkpoint), []
    infilled = {"image": noise(), "mask": left_half()}
    with Engine(checkpoint, CPU, torch.float32) as engine:
        passes(checkpoint.network, rows)
        engine.generate(Request(steps=2, guidance=3.0))
        assert rows == [1, 1, 2, 2]
        rows.clear()
        engine.generate(Request(steps=2, guidance=3.0, **infilled))
        assert rows == [2, 2, 2, 2], "here the known half of the image does"


def test_mixed_orders_share_steps_and_change_nothing(engine):
    orders = [None, "together", ("image", "text"), ("text", "image")]
    requests = [Request(num=2, steps=2 + i, seed=i, order=order, solver="ddpm") for i, order in enumerate(orders)]
    before = engine.stats().forwards
    found = engine.generate(requests)
    assert engine.stats().forwards - before == 2 * 5, "the steps of the longest"
    for request, result in zip(requests, found, strict=True):
        assert_same(result, engine.generate(request))


@pytest.mark.parametrize("order", [("sound",), ("text", "sketch"), ("text", "image", "sound")])
def test_an_order_of_modalities_that_the_model_has_not_is_refused(engine, order):
    with pytest.raises(InputError, match=f"^order: '{order[-1]}' is not a modality .*; use one of image, text"):
        engine.generate(Request(order=order))


RENOISE = {"conditioning": "renoise", "time_sampling": "shared"}


def test_a_model_of_renoise_conditioning_generates_together_only(tiny_checkpoint, tmp_path):
    folder = with_config(tiny_checkpoint, tmp_path / "c", diffusion=RENOISE, sampling={"order": []})
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        result = engine.generate(Request(steps=STEPS))
        assert (result.order, result.guidance) == ((), 1.0)
        assert_same(engine.generate(Request(steps=STEPS, order="together")), result)
        for given in ({}, {"prompt": "red _", "image": noise(), "mask": left_half()}):
            with pytest.raises(InputError, match="^order: .*; use together: .* renoise conditioning"):
                engine.generate(Request(**given, order=("text", "image")))


# ------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("schedule, spacing", [("cosine", "even"), ("scaled_linear", "power")])
@pytest.mark.parametrize("changes, solver", [({}, "dpm++"), (RENOISE, "ddpm")], ids=["clean", "renoise"])
def test_solver_and_spacing_are_the_better_ones_for_the_model(
    tiny_checkpoint, tmp_path, schedule, spacing, changes, solver
):
    changes = {**changes, "schedule": schedule}
    folder = with_config(tiny_checkpoint, tmp_path / "c", diffusion=changes, sampling={"order": []})
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        joint, found = engine.generate([Request(steps=STEPS), Request("red _", steps=STEPS)])
        assert (joint.solver, joint.spacing) == ("dpm++", spacing), "nothing is renoised"
        assert (found.solver, found.spacing) == (solver, spacing)
        assert_same(engine.generate(Request("red _", steps=STEPS, solver=solver, spacing=spacing)), found)


@pytest.mark.parametrize("spacing", ["even", "power"])
def test_the_guided_part_of_the_way_is_counted_in_steps_whatever_the_spacing(tiny_checkpoint, spacing):
    checkpoint, rows = load(tiny_checkpoint), []
    with Engine(checkpoint, CPU, torch.float32) as engine:
        passes(checkpoint.network, rows)
        engine.generate(Request("red cat", steps=8, guidance=3.0, guidance_interval=(0, 0.45), spacing=spacing))
    assert rows == [2] * 4 + [1] * 4


def test_langevin_steps_are_calls_of_the_model_for_renoised_parts_only(engine, tiny_checkpoint, tmp_path):
    request = Request("red _", steps=3, infill="langevin", inner_steps=2, guidance=1.0)
    with pytest.raises(InputError, match="^infill: 'langevin' is for models with renoise conditioning; leave it out"):
        engine.generate(request)
    folder = with_config(tiny_checkpoint, tmp_path / "c", diffusion=RENOISE, sampling={"order": []})
    with Engine.from_pretrained(folder, dtype="float32") as renoising:
        found = renoising.generate(request)
        assert renoising.stats().forwards == 3 + 2 * 2
        other = renoising.generate(
            Request("red _", steps=3, infill="langevin", inner_steps=2, step_size=0.1, guidance=1.0)
        )
        assert difference(found.image, other.image) > 0


# ------------------------------------------------------------------------------------------------- guidance


def test_empty_guidance_is_away_from_the_empty_text_and_the_grey_image(engine):
    """At scale 0 the extra pass is all there is."""
    given = {"seed": 3, "steps": STEPS, "solver": "ddim"}
    away = Request(prompt="red cat", guidance=0, guidance_kind="empty", **given)
    empty = Request(inputs={"text": ""}, guidance=1, **given)
    found, expected, named = engine.generate([away, empty, Request(prompt="red cat", guidance=1, **given)])
    assert difference(found.image, expected.image) <= 1 < difference(found.image, named.image)
    assert (found.text, found.order) == ("red cat", ())

    grey = Request(image=Image.new("RGB", (32, 32), (128, 128, 128)), guidance=1, **given)
    found, expected = engine.generate([Request(image=noise(), guidance=0, guidance_kind="empty", **given), grey])
    assert found.text == expected.text and difference(found.image, noise()) == 0


def test_masked_guidance_is_away_from_noise(engine):
    given = {"prompt": "red cat", "seed": 3, "steps": STEPS, "guidance": 2.0}
    default, masked, empty = engine.generate(
        [Request(**given, guidance_kind=kind) for kind in (None, "masked", "empty")]
    )
    assert_same(default, masked, rounding=0)
    assert difference(masked.image, empty.image) > 1


def test_unidiffuser_s_guidance_has_a_pass_for_each_generated_modality(tiny_checkpoint):
    checkpoint, rows = load(tiny_checkpoint), []
    with Engine(checkpoint, CPU, torch.float32) as engine:
        passes(checkpoint.network, rows)
        joint = engine.generate(Request(seed=1, steps=2, guidance=3.0, guidance_kind="unidiffuser"))
        assert rows == [3, 3] and joint.order == ()
        rows.clear()
        drawn = {"prompt": "red", "steps": 2, "guidance": 3.0}
        found = engine.generate(Request(**drawn, guidance_kind="unidiffuser"))
        assert rows == [2, 2]
        assert_same(found, engine.generate(Request(**drawn)))
        plain = engine.generate(Request(seed=1, steps=2, guidance=1.0, order="together"))
    assert difference(joint.image, plain.image) > 1


def test_together_with_nothing_known_modalities_guide_each_other_in_turn(tiny_checkpoint):
    checkpoint, rows = load(tiny_checkpoint), []
    given = {"seed": 1, "steps": 4, "guidance": 3.0}
    with Engine(checkpoint, CPU, torch.float32) as engine:
        passes(checkpoint.network, rows)
        default = engine.generate(Request(**given, order="together"))
        assert rows == [2] * 4
        assert_same(engine.generate(Request(**given, guidance_kind="alternate")), default, rounding=0)
        plain, unidiffuser = engine.generate(
            [Request(**given | {"guidance": 1.0}, order="together"), Request(**given, guidance_kind="unidiffuser")]
        )
    assert difference(default.image, plain.image) > 1 and difference(default.image, unidiffuser.image) > 1


def test_numbers_of_numpy_sample_as_those_of_python_do(engine):
    plain = {"num": 2, "steps": 3, "seed": 3, "guidance": 2.5, "eta": 0.5, "guidance_interval": (0.25, 1.0)}
    kinds = [np.int64, np.int32, np.uint64, np.float32, np.float32, lambda pair: tuple(map(np.float64, pair))]
    given = {key: kind(value) for kind, (key, value) in zip(kinds, plain.items(), strict=True)}
    found, expected = (engine.generate(Request("red cat", solver="ddim", **one)) for one in (given, plain))
    assert_same(found, expected, rounding=0)
    assert json.dumps([found.guidance, *(sample.seed for sample in found.samples)]) == "[2.5, 3, 4]"


@pytest.mark.parametrize("kind", ["alternate", "unidiffuser", "empty"])
def test_an_order_is_guided_by_masking_only(engine, kind):
    assert engine.generate(Request(steps=1, guidance_kind=kind)).order == (), "the default gives way"
    with pytest.raises(InputError, match=f"^guidance_kind: '{kind}' .*; use masked, or order together"):
        engine.generate(Request(order=("text", "image"), guidance_kind=kind))


@pytest.mark.parametrize(
    "given",
    [{}, {"prompt": "red cat"}, {"image": noise(), "mask": left_half()}],
    ids=["nothing", "prompt", "half image"],
)
def test_ddim_with_eta_1_is_ddpm(engine, given):
    given = {**given, "steps": 6, "seed": 4}
    ddpm, noisy, quiet, half = engine.generate(
        [
            Request(**given, solver="ddpm"),
            Request(**given, solver="ddim", eta=1),
            Request(**given, solver="ddim"),
            Request(**given, solver="ddim", eta=0.5),
        ]
    )
    assert_same(noisy, ddpm)
    assert min(difference(a.image, b.image) for a, b in [(quiet, noisy), (half, noisy), (quiet, half)]) > 1
