"""Checkpoints by their name on the Hugging Face hub: from a cache that the test makes, and uploads to a stand-in."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_cases import COMMIT, in_cache
from huggingface_hub import ModelCard, constants, errors
from huggingface_hub.utils import filter_repo_objects

from engine import Engine, InputError, Request, checkpoint, evaluate, sample
from engine.evaluation import JointScores, NameScores, Scores
from engine.hub import local_folder, name_of
from engine.model_card import model_card
from engine.presets import PRESETS
from engine.training.options import TrainOptions

NAME = "owner/tiny"


@pytest.fixture
def cache(tiny_checkpoint, tmp_path, monkeypatch) -> Path:
    """An offline cache in huggingface_hub's layout that holds NAME, with branch main and tag v1 at COMMIT."""
    snapshot = in_cache(tiny_checkpoint, tmp_path / "hub", NAME, refs=["main", "v1"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_model_that_comes_with_the_engine_has_a_name_unless_a_path_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", Path("emoji"), "emoji/"):
        assert local_folder(name) == checkpoint.BUILT_IN
    for name in ("nowhere", "x" * 5000, "../emoji", str(tmp_path / "emoji")):
        assert local_folder(name) == Path(name)
    assert name_of(local_folder("emoji")) == "emoji" and name_of(Path("runs/emoji")) == "runs/emoji"
    (tmp_path / "emoji").mkdir()
    assert local_folder("emoji") == Path("emoji")


@pytest.mark.parametrize(
    "name, revision", [(NAME, None), (Path(NAME), None), (NAME, "v1"), (f"{NAME}@v1", None), (f"{NAME}@{COMMIT}", None)]
)
def test_a_name_on_the_hub_is_its_folder_in_the_cache(cache, name, revision):
    assert local_folder(name, revision=revision) == cache


def test_an_engine_of_a_name_samples_as_that_of_the_folder(cache, tiny_checkpoint):
    request = Request(steps=1, seed=3)
    with (
        Engine.from_pretrained(NAME, revision="main", dtype="float32") as theirs,
        Engine.from_pretrained(tiny_checkpoint, dtype="float32") as ours,
    ):
        a, b = theirs.generate(request), ours.generate(request)
    assert a.text == b.text and a.image.tobytes() == b.image.tobytes()


def test_a_folder_wins_over_a_name_on_the_hub(cache, tiny_checkpoint):
    own = cache.parents[3] / NAME
    shutil.copytree(tiny_checkpoint, own)
    assert checkpoint.load(NAME).folder == Path(NAME)
    with pytest.raises(InputError, match="^revision: 'v1' is of the hub, but owner/tiny is a local path"):
        checkpoint.load(NAME, revision="v1")


@pytest.mark.parametrize(
    "name, revision, argument, message",
    [
        ("owner/other", None, "checkpoint", "not in the cache of the hub"),
        (NAME, "v2", "checkpoint", "not in the cache of the hub"),
        (f"{NAME}@v1", "v1", "revision", "beside"),
        (None, "v1", "revision", "leave it out"),
        ("owner/a..b", None, "checkpoint", "is not a name on the hub"),
        ("owner/tiny/text", None, "checkpoint", "owner/tiny/text is not a folder"),
        ("../tiny", None, "checkpoint", "../tiny is not a folder"),
    ],
)
def test_what_is_not_in_the_cache_is_refused_in_one_line(cache, name, revision, argument, message):
    with pytest.raises(InputError) as error:
        Engine.from_pretrained(name, revision=revision)
    assert error.value.argument == argument
    assert message in str(error.value) and "\n" not in str(error.value)


def answered(kind: type, status: int) -> Exception:
    """An error of huggingface_hub about an answer of the hub."""
    request = SimpleNamespace(method="GET", url="https://huggingface.co")
    return kind("What the hub said.\nMore.", response=SimpleNamespace(headers={}, request=request, status_code=status))


@pytest.mark.parametrize(
    "error, argument, parts",
    [
        (
            answered(errors.GatedRepoError, 403),
            "checkpoint",
            ["gated", "https://huggingface.co/owner/tiny", "auth login"],
        ),
        (answered(errors.RepositoryNotFoundError, 404), "checkpoint", ["neither a folder nor a model", "engine.train"]),
        (answered(errors.RevisionNotFoundError, 404), "revision", ["'v1' is not one of owner/tiny"]),
        (answered(errors.RemoteEntryNotFoundError, 404), "checkpoint", ["without config.json"]),
        (answered(errors.HfHubHTTPError, 500), "checkpoint", ["failed at the hub (What the hub said.)", "try again"]),
        (ConnectionResetError(), "checkpoint", ["failed at the hub (ConnectionResetError)"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub_become_one_sentence(cache, monkeypatch, error, argument, parts):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError) as found:
        checkpoint.load(NAME, revision="v1")
    assert found.value.argument == argument
    assert all(part in str(found.value) for part in parts), str(found.value)
    assert "\n" not in str(found.value)


def test_the_config_of_another_library_is_refused_with_the_models_name(cache):
    (cache / "config.json").unlink()
    (cache / "config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(InputError, match="^checkpoint: 'owner/tiny' has the config.json of something else"):
        checkpoint.load(NAME)


@pytest.mark.parametrize("variants", [False, True])
def test_only_the_files_of_the_checkpoint_are_downloaded(cache, monkeypatch, variants):
    def snapshot(name, revision, allow_patterns, ignore_patterns):
        asked.update(filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert (name, revision) == (NAME, COMMIT)  # that of config.json, whatever has been pushed since
        return cache

    needed = {"config.json", "model.safetensors", "text/vocabulary.json", "text/vectors.safetensors",
              "image/config.json", "image/diffusion_pytorch_model.safetensors", "model_index.json",
              "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
              "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"}  # fmt: skip
    fp16 = {"transformer/diffusion_pytorch_model.fp16.safetensors"}
    others = {"README.md", "pytorch_model.bin", "image/diffusion_pytorch_model.bin", "text/evil.py", "evil.pkl",
              "runs/optimizer.safetensors", "grid.png"}  # fmt: skip
    listed, asked = [*needed, *fp16, *others], set()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    local_folder(NAME, variants=variants)
    assert asked == needed | (fp16 if variants else set())


def test_command_lines_take_a_name(cache, capsys, monkeypatch):
    assert sample.main(["--checkpoint", f"{NAME}@v1", "--steps", "1", "--num", "1", "--quiet", "--out", "drawn"]) == 0
    assert Path("drawn/0000.png").is_file()
    assert sample.main(["--checkpoint", "owner/other"]) == 2
    assert capsys.readouterr().err.startswith("python -m engine.sample: --checkpoint: owner/other is not a folder")
    assert evaluate.main(["--checkpoint", NAME, "--data", "nowhere"]) == 2
    assert "--data: nowhere" in capsys.readouterr().err  # the checkpoint was loaded before


def test_training_starts_from_a_name(cache):
    assert TrainOptions("data", "run", preset="tiny", init=NAME).init == cache
    with pytest.raises(InputError, match="^init: owner/other is not a folder, is not in the cache of the hub"):
        TrainOptions("data", "run", preset="tiny", init="owner/other")
    with pytest.raises(InputError, match="^init: owner/nnet.pth does not exist"):  # and the hub is not asked
        TrainOptions("data", "run", preset="tiny", init="owner/nnet.pth")


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A stand-in for the hub that records what it is asked."""
    hub = SimpleNamespace(files={}, asked=[])

    def create_commit(api, repo_id, operations, **options):
        hub.asked.append(("commit", repo_id, options))
        for operation in operations:
            with operation.as_file() as file:
                hub.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url="https://hub/commit")

    def create_repo(api, repo_id, **options):
        hub.asked.append(("repository", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(api, repo_id, **options):
        hub.asked.append(("branch", repo_id, options))

    for function in (create_commit, create_repo, create_branch):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    return hub


def test_a_pushed_checkpoint_is_its_files_and_a_card_in_one_commit(hub, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    expected = {p.relative_to(folder).as_posix(): p.read_bytes() for p in filter(Path.is_file, folder.rglob("*"))}
    for other in ("optimizer.safetensors", "text/notes.md", "samples/0000.png"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("not of the checkpoint")
    assert checkpoint.push_to_hub(folder, NAME, private=True) == "https://hub/commit"
    assert ModelCard(hub.files.pop("README.md").decode()).data.library_name == "psunet-engine"
    assert hub.files == expected
    assert hub.asked == [
        ("repository", NAME, {"private": True, "exist_ok": True}),
        ("commit", NAME, {"commit_message": "Upload checkpoint", "revision": None}),
    ]


def test_a_model_that_comes_with_the_engine_is_pushed_by_its_name_with_the_codecs_it_links_to(hub):
    checkpoint.push_to_hub("emoji-sketch", NAME)
    text = {f"text/{name}" for name in ("vectors.safetensors", "vocabulary.json")}
    image = {f"image/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors", *text, *image}


def test_a_folders_own_card_is_pushed_unless_there_are_scores(hub, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "README.md").write_text("# Mine")
    checkpoint.push_to_hub(folder, NAME, revision="next")
    assert hub.files["README.md"] == b"# Mine"
    assert ("branch", NAME, {"branch": "next", "exist_ok": True}) in hub.asked
    (tmp_path / "scores.json").write_text(json.dumps(REPORT))
    checkpoint.push_to_hub(folder, NAME, evaluation=tmp_path / "scores.json")
    assert b"0.875" in hub.files["README.md"]
    assert (folder / "README.md").read_text() == "# Mine"


def test_what_cannot_be_loaded_is_not_pushed(hub, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="^checkpoint: .*model.safetensors"):
        checkpoint.push_to_hub(folder, NAME)
    with pytest.raises(InputError, match="^evaluation: .*report of engine.evaluate"):
        checkpoint.push_to_hub(tiny_checkpoint, NAME, evaluation={"train": {}})
    assert not hub.asked and not hub.files


def test_a_refused_push_is_one_sentence(hub, tiny_checkpoint, monkeypatch):
    def refuse(api, repo_id, **options):
        raise answered(errors.HfHubHTTPError, 401)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match="^repo_id: 'owner/tiny' failed at the hub") as error:
        checkpoint.push_to_hub(tiny_checkpoint, NAME)
    assert error.value.argument == "repo_id"


SPLIT = {"count": 96, "retrieval_base": 0.875, "retrieval_exact": 0.5, "reordered_exact": 0.375,
         "keyword_retrieval": 0.125, "word_f1": 0.25, "caption_exact": None,
         "infill_rmse": 29.3125, "autoencoder_psnr": 28.7, "classes": {},
         "disturbed": {"shifted": {"word_f1": 0.375, "caption_exact": 0.1}}}  # fmt: skip
REPORT = {
    "train": SPLIT,
    "test": {**SPLIT, "disturbed": None},
    "joint": {
        "count": 64,
        "seed": 0,
        "order": ["text", "image"],
        "word_f1": 0.616,
        "distinct_images": 59,
        "nearest_rmse": 33.6,
    },  # fmt: skip
    "skipped": {"infill": "the model does not predict image"},
}


def test_the_card_has_the_hubs_metadata_and_all_scores():
    card = ModelCard(model_card(PRESETS["tiny"], NAME, REPORT))
    assert card.data.pipeline_tag == "text-to-image" and {"image-to-text", "psunet-engine"} <= set(card.data.tags)
    for part in ("0.875", "29.31", "0.375", "59", "text, image", "| –", 'from_pretrained("owner/tiny")', "skipped"):
        assert part in card.text, part
    assert "Scores" not in model_card(PRESETS["tiny"], NAME)


def test_the_reports_of_these_tests_have_the_keys_of_engine_evaluate():
    scores = {field.name for field in (*fields(NameScores), *fields(Scores))}
    assert SPLIT.keys() == scores | {"disturbed"}
    assert REPORT["joint"].keys() == {field.name for field in fields(JointScores)}
