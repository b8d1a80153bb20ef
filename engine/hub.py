"""Checkpoints by name: those that come with the engine, and those on the Hugging Face hub, where new ones are uploaded.
Imports no torch.

huggingface_hub decides about cache, offline mode, endpoint and login (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN).
Only JSON, text and safetensors are downloaded.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from engine.config import Config
from engine.errors import InputError, cut
from engine.files import is_folder, read_json

MODELS = {name: Path(__file__).parent / "assets" / name for name in ("emoji", "emoji-sketch")}  # built in
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
PIPELINE_FOLDERS = ("transformer", "scheduler")  # beside those of the codecs, see `engine.pipeline`
ENDINGS = ("json", "safetensors", "txt")
VARIANTS = "*/diffusion_pytorch_model.*.safetensors"  # further versions of the same weights, such as fp16
REMEDY = (
    "give a folder that engine.train has written, the owner/name of a model on the Hugging Face hub, or "
    f"{' or '.join(MODELS)}"
)


def local_folder(
    source: str | PathLike, argument: str = "checkpoint", revision: str | None = None, variants: bool = False, **options
) -> Path:
    """The folder of a checkpoint: `source` itself, or what it names, downloaded from the hub unless it is in the cache.

    source    a path; if nothing is there, a name of `MODELS`, or "owner/name" or "owner/name@revision" on the hub
    revision  branch, tag or commit on the hub, the default branch if there is none
    variants  download further versions of the weights too
    options   of huggingface_hub's downloads, such as `token`, `cache_dir`, `force_download`, `local_files_only`

    A path that is neither a folder nor of that form is returned as it is. Raises InputError about `argument`, or about
    "revision", for what is not on the hub, or cannot be reached and is not in the cache.
    """
    name = NAME.fullmatch(os.fspath(source))
    if name is None or os.path.lexists(source) or is_folder(source, argument):
        if revision is not None:
            raise InputError("revision", revision, "leave it out", f"is of the hub, but {source} is a local path")
        path = Path(source)
        return path if os.path.lexists(path) else MODELS.get(str(path), path)
    if revision is not None and name["revision"] is not None:
        raise InputError("revision", revision, "leave out one of them", f"is given beside that of {source}")
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, revision = name["repository"], name["revision"] or revision
    with _hub_errors(argument, source, revision):
        file = Path(hf_hub_download(repository, "config.json", revision=revision, **options))
    try:
        config = Config.from_dict(read_json(file, argument, REMEDY, REMEDY))
    except InputError as error:
        raise InputError(argument, source, REMEDY, f"has the config.json of something else ({error})") from None
    with _hub_errors(argument, source, revision):
        folder = snapshot_download(
            repository,
            revision=file.parent.name,  # the commit that the config is of, should the branch have moved
            allow_patterns=patterns(config),
            ignore_patterns=None if variants else VARIANTS,
            **options,
        )
    return Path(folder)


def name_of(folder: Path) -> str:
    """What a run records of a checkpoint's folder: the name of a model that comes with the engine, else the path."""
    return next((name for name, path in MODELS.items() if path == folder), str(folder))


def patterns(config: Config) -> list[str]:
    """Patterns of `fnmatch` for a checkpoint's files: its own, its codecs' and those of a pipeline's components."""
    folders = {codec.folder or name for name, codec in config.codecs.items()} | {*PIPELINE_FOLDERS}
    inside = (f"{folder}/*.{ending}" for folder in sorted(folders) for ending in ENDINGS)
    return ["config.json", "model_index.json", "model.safetensors", *inside]


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Adds or replaces files, by their path there, in one commit; makes the repository if there is none.

    Returns the address of the commit. Raises InputError about "repo_id".
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _hub_errors("repo_id", repository, revision):
        hub = HfApi(token=token)
        repository = hub.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return hub.create_commit(repository, operations, commit_message=message, revision=revision).commit_url


@contextmanager
def _hub_errors(argument: str, source: str | PathLike, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises, as InputError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{NAME.fullmatch(os.fspath(source))['repository']}"
        remedy = f"accept its terms at {page} and log in with `hf auth login`"
        raise InputError(argument, source, remedy, "is a gated model") from error
    except errors.RepositoryNotFoundError as error:
        problem = "is neither a folder nor a model on the hub that you can read"
        raise InputError(
            argument, source, f"{REMEDY}; for a private one log in with `hf auth login`", problem
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError("revision", revision, "give a branch, tag or commit", f"is not one of {source}") from error
    except errors.LocalEntryNotFoundError as error:
        problem = "is not a folder, is not in the cache of the hub, and the hub is offline or cannot be reached"
        raise InputError(argument, source, f"{REMEDY} while online", problem) from error
    except errors.EntryNotFoundError as error:
        raise InputError(argument, source, REMEDY, "is a model on the hub without config.json") from error
    except errors.HFValidationError as error:
        raise InputError(argument, source, REMEDY, f"is not a name on the hub ({_first_line(error)})") from error
    except Exception as error:  # networks, proxies and servers fail in any way
        remedy = "try again, or give a local folder"
        raise InputError(argument, source, remedy, f"failed at the hub ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return cut(next(iter(str(error).splitlines()), "") or type(error).__name__, 200)
