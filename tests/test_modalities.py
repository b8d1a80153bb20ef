"""Models of other modalities than an image and a text: two images and a text, a text alone, an image alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import STEPS, assert_same, difference, left_half, levels, noise
from PIL import Image

from engine import Engine, Request
from engine.checkpoint import load, save
from engine.errors import InputError
from engine.sample import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(three_modality_checkpoint):
    with Engine.from_pretrained(three_modality_checkpoint, dtype="float32") as engine:
        yield engine


def requests() -> list[Request]:
    """With one, two or no modalities given, in whole or in part."""
    return [
        Request(num=2, steps=STEPS),
        Request(inputs={"sketch": noise(1)}, steps=STEPS, seed=3),
        Request(image=noise(2), inputs={"sketch": noise(1)}, masks={"sketch": left_half()}, steps=STEPS),
        Request(prompt="red _", image=noise(2), mask=left_half(), inputs={"sketch": noise(1)}, steps=STEPS),
        Request(prompt="red cat", inputs={"sketch": noise(1)}, steps=STEPS, solver="ddpm"),
        Request(inputs={"image": noise(2), "sketch": noise(1)}, masks={"image": left_half(), "sketch": left_half()}),
        Request(prompt="red cat", steps=STEPS, order=("image",)),
        Request(steps=STEPS, order="together", guidance=2.0),
    ]


@pytest.fixture(scope="module")
def results(engine):
    return [engine.generate(request) for request in requests()]


def test_tasks_and_orders_go_by_what_is_given(results):
    assert [(result.task, result.order) for result in results] == [
        ("joint", ("text", "sketch", "image")),
        ("sketch-to-image+text", ("text", "image")),
        ("infill", ("text", "sketch")),
        ("infill", ("text", "image")),
        ("text+sketch-to-image", ()),
        ("infill", ("text", "sketch", "image")),
        ("text-to-image+sketch", ("image", "sketch")),
        ("joint", ()),
    ]
    assert {result.guidance for result in results[:7]} == {3.0}


def test_every_modality_is_among_a_sample_s_outputs(results):
    for sample in (sample for result in results for sample in result.samples):
        assert list(sample.outputs) == ["image", "text", "sketch"]
        assert isinstance(sample.text, str) and sample.outputs["sketch"].size == sample.image.size == (32, 32)
        assert difference(sample.image, sample.outputs["sketch"]) > 1


def test_given_images_come_back_unaltered_where_they_are_known(results):
    _, sketch, half_sketch, half_image, both, halves, _, _ = results
    for result in (sketch, half_image, both):
        assert difference(result.samples[0].outputs["sketch"], noise(1)) == 0
    assert difference(half_sketch.image, noise(2)) == 0
    for result, name, seed in [
        (half_sketch, "sketch", 1),
        (half_image, "image", 2),
        (halves, "sketch", 1),
        (halves, "image", 2),
    ]:
        after, before = levels(result.samples[0].outputs[name]), levels(noise(seed))
        assert np.array_equal(after[:, 16:], before[:, 16:]) and not np.array_equal(after[:, :16], before[:, :16])
    words = half_image.text.split()
    assert (len(words), words[0], both.text) == (2, "red", "red cat")


def test_results_are_the_same_alone_and_together(engine, results):
    for found, expected in zip(engine.generate(requests()), results, strict=True):
        assert_same(found, expected)


def test_each_modality_takes_part_in_making_the_others(engine):
    """Other sketches and other words make other images."""
    given = {"steps": STEPS, "seed": 5}
    sketches = [Request("red cat", inputs={"sketch": noise(i)}, **given) for i in (1, 2)]
    words = [Request(text, inputs={"sketch": noise(1)}, **given) for text in ("red cat", "old moon")]
    for a, b in ((*engine.generate(sketches),), (*engine.generate(words),)):
        assert difference(a.image, b.image) > 1


def test_in_order_every_modality_takes_all_the_steps(engine):
    counts = []
    engine.generate(Request(steps=2), lambda *count: counts.append(count))
    assert counts == [(i, 6) for i in range(1, 7)]


def test_a_pass_for_each_of_three_modalities(three_modality_checkpoint):
    checkpoint, rows = load(three_modality_checkpoint), []
    checkpoint.network.shared_middle[0].register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    with Engine(checkpoint, CPU, torch.float32) as engine:
        engine.generate(Request(steps=2, guidance=2.0, guidance_kind="unidiffuser"))
        engine.generate(Request(steps=2, guidance=2.0, guidance_kind="alternate"))
        engine.generate(Request("red", steps=2, guidance=2.0, guidance_kind="empty"))
    assert rows == [4, 4, 2, 2, 2, 2]


def test_warmup_runs_every_task_of_the_model(three_modality_checkpoint):
    with Engine.from_pretrained(three_modality_checkpoint, dtype="float32") as engine:
        engine.warmup(batch=2)
        assert engine.stats().samples > 8


@pytest.mark.parametrize(
    ("given", "argument", "said"),
    [
        ({"inputs": {"sketch": "none.png"}}, "inputs['sketch']", "none.png does not exist"),
        ({"inputs": {"sketch": "red cat\0"}}, "inputs['sketch']", "red cat"),
        ({"inputs": {"sound": "a.wav"}}, "inputs['sound']", "'sound' is not a modality of the model"),
        ({"inputs": {"sketch": noise()}, "masks": {"sketch": left_half((8, 8))}}, "masks['sketch']", "is 8x8"),
        ({"inputs": {"sketch": noise()}, "masks": {"sketch": "none.png"}}, "masks['sketch']", "does not exist"),
        ({"order": ("text", "sound")}, "order", "use one of image, text, sketch"),
        ({"sketch": "none.png"}, "sketch", "none.png does not exist"),
        ({"sketch": noise(), "sketch_mask": left_half((8, 8))}, "sketch_mask", "is 8x8"),
        (
            {"prompt": "red", "image": noise(), "sketch": noise()},
            "prompt, image, sketch",
            "nothing is left to generate",
        ),
        (
            {"prompt": "red", "image": noise(), "inputs": {"sketch": noise()}},
            "inputs['sketch'], prompt, image",
            "nothing is left to generate",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_modality_s_argument(engine, given, argument, said):
    with pytest.raises(InputError) as refused:
        engine.generate(Request(**given))
    assert refused.value.argument == argument and said in str(refused.value)


def test_it_is_saved_and_loaded(engine, results, three_modality_checkpoint, tmp_path):
    checkpoint = load(three_modality_checkpoint)
    save(tmp_path / "copy", checkpoint.config, checkpoint.network.state_dict(), torch.float32)
    for name, config in checkpoint.config.codecs.items():
        engine.codecs[name].save(tmp_path / "copy" / (config.folder or name))
    assert sorted(path.name for path in (tmp_path / "copy").iterdir() if path.is_dir()) == ["image", "text"]
    with Engine.from_pretrained(tmp_path / "copy", dtype="float32") as other:
        assert other.config == checkpoint.config
        for request, expected in zip(requests()[:3], results, strict=False):
            assert_same(other.generate(request), expected, rounding=0)


# ------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The working folder, with images and a mask in it."""
    monkeypatch.chdir(tmp_path)
    noise(1).save("sketch.png")
    noise(2).save("image.png")
    left_half().save("left.png")
    return tmp_path


def sample(checkpoint: Path, *arguments: str) -> list[dict]:
    """What samples.json says after a run of two steps."""
    command = ["--checkpoint", str(checkpoint), "--dtype", "float32", "--steps", "2", "--quiet", *arguments]
    assert main(command) == 0
    return json.loads(Path("samples/samples.json").read_text(encoding="utf-8"))[:-1]


def test_the_command_line_takes_and_writes_every_modality(three_modality_checkpoint, files):
    arguments = ["--image", "image.png", "--input", "sketch=sketch.png", "--input-mask", "sketch=left.png"]
    report = sample(three_modality_checkpoint, *arguments, "--num", "2")
    names = ["0000-sketch.png", "0000.png", "0001-sketch.png", "0001.png", "grid.png", "samples.json"]
    assert sorted(path.name for path in (files / "samples").iterdir()) == names
    for i, line in enumerate(report):
        assert (line["image"], line["outputs"]["sketch"]) == (f"000{i}.png", f"000{i}-sketch.png")
        assert (line["task"], line["order"], line["prompt"]) == ("infill", ["text", "sketch"], None)
        assert isinstance(line["text"], str)
        with Image.open(files / "samples" / line["image"]) as image:
            assert difference(image, noise(2)) == 0
        with Image.open(files / "samples" / line["outputs"]["sketch"]) as sketch:
            after, before = levels(sketch), levels(noise(1))
        assert np.array_equal(after[:, 16:], before[:, 16:]) and not np.array_equal(after[:, :16], before[:, :16])


def test_inputs_of_the_command_line_name_any_modality(three_modality_checkpoint, files):
    given = ["--input", "text=red cat", "--input", "sketch=sketch.png"]
    (line,) = sample(three_modality_checkpoint, *given)
    assert (line["task"], line["text"], line["order"]) == ("text+sketch-to-image", "red cat", "together")
    for sketch in (["--input", "sketch=sketch.png"], ["--sketch", "sketch.png"]):
        (short,) = sample(three_modality_checkpoint, "--prompt", "red cat", *sketch)
        assert short | {"prompt": None} == line
    masked = ["--input", "sketch=sketch.png", "--input-mask", "sketch=left.png"]
    short = ["--sketch", "sketch.png", "--sketch-mask", "left.png"]
    assert sample(three_modality_checkpoint, *short) == sample(three_modality_checkpoint, *masked)


def test_a_grid_has_the_images_of_a_sample_side_by_side(three_modality_checkpoint, files):
    sample(three_modality_checkpoint, "--num", "5", "--order", "sketch,text")
    with Image.open("samples/grid.png") as grid:
        columns = (grid.width - 8) // 104  # images are enlarged to 96 pixels
        for i in range(5):
            for name, place in ((f"000{i}.png", 2 * i), (f"000{i}-sketch.png", 2 * i + 1)):
                x = 8 + place % columns * 104
                y = 8 + place // columns * ((grid.height - 8) // -(-10 // columns))
                with Image.open(files / "samples" / name) as image:
                    assert (
                        difference(grid.crop((x, y, x + 96, y + 96)).resize((32, 32), Image.Resampling.BOX), image) == 0
                    )
        assert columns % 2 == 0, "a sample's images are in one row"


@pytest.mark.parametrize(
    ("arguments", "option", "said"),
    [
        (["--input", "sketch"], "--input", "'sketch' is not NAME=VALUE"),
        (["--input", "=a.png"], "--input", "'=a.png' is not NAME=VALUE"),
        (["--input", "sketch="], "--input", "'sketch=' is not NAME=VALUE"),
        (["--input", "sketch=none.png"], "--input", "none.png does not exist"),
        (["--input", "sound=a.wav"], "--input", "'sound' is not a modality of the model"),
        (["--input", "text=purple"], "--input", "'purple'"),
        (["--input-mask", "sketch=left.png"], "--input-mask", "'left.png' needs the sketch"),
        (
            ["--input", "sketch=sketch.png", "--input-mask", "sketch=none.png"],
            "--input-mask",
            "none.png does not exist",
        ),
        (["--input", "image=image.png", "--image", "image.png"], "--image", "is given twice"),
        (["--input", "sketch=sketch.png", "--sketch", "sketch.png"], "--sketch", "is given twice"),
        (["--sketch", "none.png"], "--sketch", "none.png does not exist"),
        (["--sketch-mask", "left.png"], "--sketch-mask", "left.png needs the sketch"),
        (["--order", "text,sound"], "--order", "'sound' is not a modality of the model"),
        (["--order", "text,text"], "--order", "give distinct names"),
        (["--order", ""], "--order", "''"),
    ],
    ids=" ".join,
)
def test_the_command_line_refuses_in_one_line(three_modality_checkpoint, files, capsys, arguments, option, said):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["--checkpoint", str(three_modality_checkpoint), "--dtype", "float32", *arguments]))
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert said in output.err and "; " in output.err
    assert f" {option}: " in output.err or f"argument {option}: " in output.err
    assert not (files / "samples").exists()


# ------------------------------------------------------------------------------------------------- one modality


def test_a_model_of_one_modality_generates_and_fills_in(single):
    name, folder = single
    partly = Request("red _") if name == "text" else Request(image=noise(), mask=left_half())
    other = {"image": noise()} if name == "text" else {"prompt": "red"}
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        engine.warmup()
        joint, infilled = engine.generate([Request(num=2, steps=STEPS), replace(partly, steps=STEPS)])
        assert_same(engine.generate(Request(num=2, steps=STEPS, order=(name,))), joint)
        with pytest.raises(InputError, match=f"is not a modality of the model; use one of {name}"):
            engine.generate(Request(**other))
    assert (joint.task, joint.order, joint.guidance, infilled.task) == ("joint", (), 1.0, "infill")
    first, second = joint.samples
    assert list(first.outputs) == [name]
    if name == "text":
        assert first.text != second.text and infilled.text.startswith("red ")
    else:
        assert difference(first.image, second.image) > 10 and first.confidence == 1
        assert np.array_equal(levels(infilled.image)[:, 16:], levels(noise())[:, 16:])


def test_the_command_line_samples_a_model_of_one_modality(single, tmp_path, monkeypatch, capsys):
    name, folder = single
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(folder), "--dtype", "float32", "--steps", "2", "--num", "2"]) == 0
    said = capsys.readouterr().out
    report = json.loads(Path("samples/samples.json").read_text(encoding="utf-8"))[:-1]
    written = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert [line["seed"] for line in report] == [0, 1] and all(isinstance(line[name], str) for line in report)
    if name == "text":
        assert written == ["samples.json"] and "grid.png" not in said
    else:
        assert written == ["0000.png", "0001.png", "grid.png", "samples.json"] and "grid.png" in said
        assert "text" not in report[0]
