"""`engine.data text`: lines or joined captions to a data set, and training a model of text alone on it."""

import json
import subprocess
import sys

import pytest

from engine import checkpoint, train
from engine.codecs.words import tokenize
from engine.data.__main__ import main
from engine.data.texts import Texts
from engine.request import Request
from engine.runtime import Engine
from engine.training import denoiser


def made(tmp_path, content: bytes, *options, name="texts.txt") -> int:
    (tmp_path / name).write_bytes(content)
    return main(["text", "--from", str(tmp_path / name), "--out", str(tmp_path / "data"), *options])


def texts(tmp_path, split="train") -> list[str]:
    return list(Texts.open(tmp_path / "data", split).texts)


def test_each_line_becomes_a_text(tmp_path, capsys):
    content = "\ufeffA red Car.\r\n\r\n  \nun café _ noir\n!?\none two three four five\nlast".encode()
    assert made(tmp_path, content, "--words", "4", "--held-out", "0") == 0
    assert texts(tmp_path) == ["a red car", "un café noir", "one two three four", "last"]
    said = capsys.readouterr().out
    assert "4 training texts, 0 held out; 1 cut to 4 words, 3 without a word left out" in said
    assert not (tmp_path / "data" / "captions_test.json").exists()


def coco(captions: dict[int, list[str]]) -> bytes:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in captions]
    annotations = [{"image_id": i, "caption": c} for i, of_image in captions.items() for c in of_image]
    return json.dumps({"images": images, "annotations": annotations}).encode()


def test_the_first_captions_of_an_image_are_joined_and_its_file_stays_named(tmp_path):
    content = coco({7: ["A dog.", "a cat", "THE bird", "left out"], 8: [], 9: ["one"]})
    assert made(tmp_path, content, "--captions", "3", "--held-out", "0", name="captions.json") == 0
    assert texts(tmp_path) == ["a dog a cat the bird", "one"]
    written = json.loads((tmp_path / "data" / "captions.json").read_text())
    assert written["images"] == [{"id": "7", "file_name": "7.jpg"}, {"id": "9", "file_name": "9.jpg"}]


def test_held_out_texts_are_chosen_by_their_own_hash(tmp_path):
    lines = [f"text number {i}" for i in range(200)]
    assert made(tmp_path, "\n".join(lines * 2).encode(), "--held-out", "0.3") == 0
    first = set(texts(tmp_path, "test"))
    assert 40 < len(first) < 80 and not first & set(texts(tmp_path))  # equal lines are on the same side
    assert made(tmp_path, "\n".join(lines[::-1]).encode(), "--held-out", "0.3") == 0
    assert set(texts(tmp_path, "test")) == first
    assert made(tmp_path, "\n".join(lines).encode(), "--held-out", "0") == 0
    assert not (tmp_path / "data" / "captions_test.json").exists()  # none of the run before is left


def test_long_captions_are_held_out_by_the_id_of_their_image(tmp_path):
    sides = []
    for word in ("dog", "cat"):
        assert made(tmp_path, coco({i: [word] for i in range(100)}), "--held-out", "0.3", name="c.json") == 0
        written = json.loads((tmp_path / "data" / "captions_test.json").read_text())
        sides.append([annotation["image_id"] for annotation in written["annotations"]])
    assert sides[0] == sides[1] and 15 < len(sides[0]) < 45


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"fine\n\xff\xfe", (), "--from: {file} is not text in UTF-8 (line 2: "),
        (b"\n ?\n", (), "--from: {file} holds no text to train on; give a text file in UTF-8"),
        (b"a", ("--words", "0"), "--words: 0 is out of range; use 1 to 1024"),
        (b"a", ("--captions", "-1"), "--captions: -1 is out of range"),
        (b"a", ("--held-out", "1"), "--held-out: 1.0 is out of range"),
        (b"a", ("--held-out", "nan"), "--held-out: nan is out of range"),
        (b"a", ("--from", "nowhere.txt"), "--from: nowhere.txt does not exist"),
        (b"a", ("--from", "/"), "--from: / cannot be read (Is a directory)"),
        (b"a", ("--out", __file__), "--out: " + __file__ + " cannot be written (File exists)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, content, options, says):
    assert made(tmp_path, content, *options) == 2
    error = capsys.readouterr().err
    assert says.format(file=tmp_path / "texts.txt") in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_damaged_captions_file_is_named(tmp_path, capsys):
    assert made(tmp_path, b"[1, 2", name="captions.json") == 2
    assert f"--from: {tmp_path / 'captions.json'} cannot be read" in capsys.readouterr().err


LINES = ["a red car at night", "two dogs and a cat", "the cat sees a red car", "a blue dog"] * 3
TRAIN = ["--preset", "text-tiny", "--steps", "2", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "JOINT_SAMPLES", 2)
    assert made(tmp_path, "\n".join(LINES).encode(), "--held-out", "0") == 0
    return tmp_path / "data"


def test_a_model_of_text_alone_is_trained_resumed_and_sampled(tmp_path, data, capsys):
    run = tmp_path / "run"
    arguments = [*TRAIN, "--data", str(data), "--out", str(run)]
    assert train.main(arguments) == 0
    assert not (run / "autoencoder").exists() and not (run / "latents").exists()
    loaded = checkpoint.load(run / "checkpoint")
    known = {word for line in LINES for word in tokenize(line)}
    assert set(loaded.codec("text").vocabulary[1:]) == known
    assert len((run / "denoiser" / "samples-0000002.txt").read_text("utf-8").splitlines()) == 2
    assert train.main([*arguments, "--steps", "3"]) == 0  # resumed
    requests = [Request(num=2, steps=2), Request(inputs={"text": "a _ car"}, steps=2)]
    with Engine.from_pretrained(run / "checkpoint", device="cpu", dtype="float32") as engine:
        free, filled = engine.generate(requests)
    assert all(set(tokenize(sample.text)) <= known for sample in free.samples)
    assert filled.text.split()[0] == "a" and filled.text.split()[2] == "car" and len(filled.text.split()) == 3


def test_a_run_is_not_resumed_with_other_texts(tmp_path, data, capsys):
    arguments = [*TRAIN, "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(arguments) == 0
    assert made(tmp_path, "\n".join([*LINES, "a red dog"]).encode(), "--held-out", "0") == 0
    assert train.main(arguments) == 2
    assert "is not what this run began with: the texts have changed" in capsys.readouterr().err


def test_a_folder_without_texts_is_refused(tmp_path, data, capsys):
    arguments = [*TRAIN, "--out", str(tmp_path / "run"), "--data"]
    assert train.main([*arguments, str(tmp_path)]) == 2
    assert "has no captions_train.json or captions.json; give a folder that `python -m engine.data text` has" in (
        capsys.readouterr().err
    )
    for content, says in ((b"{", "is not readable JSON"), (b"[]", 'has no list "annotations"'),
                          (b'{"annotations": [{"caption": "?"}, 3]}', "holds no text with a word")):  # fmt: skip
        (data / "captions.json").write_bytes(content)
        assert train.main([*arguments, str(data)]) == 2
        assert says in capsys.readouterr().err


def test_making_a_data_set_of_lines_needs_no_torch(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n")
    arguments = ["text", "--from", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "data")]
    code = f"import sys\nfrom engine.data.__main__ import main\nassert main({arguments}) == 0\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
