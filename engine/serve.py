"""The engine as a service over HTTP: `python -m engine.serve`; see `--help`, and docs/how-to/serve.md.

Parses, loads and serves; the rest is in `engine.serving`. SIGTERM and Ctrl-C finish running requests, a second one ends
them; both exit with 0.
"""

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from engine.command import Parser, add_model, add_quantize, name, path, refuse, run
from engine.errors import InputError

COMMAND = "python -m engine.serve"
INSTALL = "pip install 'psunet-engine[{}]'"
NEEDED = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
MAX_ROWS = {"cuda": 64, "cpu": 8}  # on a CPU a step takes about as long as its samples one by one
CONNECTIONS = 4096  # beyond those of requests that the engines take: uvicorn counts idle ones, and closes none


def _parser() -> Parser:
    parser = Parser(COMMAND, description="Serve the engine over HTTP, with a page to try it out.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    add_model(add)
    add("--name", type=name, help="the model's name for clients (default: the checkpoint folder's)")
    add("--compile", action="store_true", help="compile the model before the first request")
    add_quantize(add)
    text = "a LoRA adapter of the checkpoint, which requests ask for by this name; may be repeated"
    add("--adapter", action="append", default=[], type=_adapter, metavar="NAME=DIR", help=text)
    text = "samples computed together at most (default: 64; on a CPU 8, where more are not faster)"
    add("--max-rows", type=int, metavar="N", help=text)
    add("--max-queue", type=int, default=256, metavar="N", help="further samples that may wait (default: 256)")
    text = "samples in the largest batch to warm up for, 0: none (default: 1; with --compile on a GPU: --max-rows)"
    add("--warmup", type=int, metavar="N", help=text)
    text = "a file of tokens, one a line (# begins a comment); clients must send one (Authorization: Bearer …)"
    add("--token-file", type=path, metavar="FILE", help=text)
    text = "a page whose scripts may call the service, such as https://example.org; may be repeated"
    add("--cors", action="append", default=[], metavar="ORIGIN", help=text)
    text = "a limit of one request, as in /v1/models, such as num=8 or body_bytes=1000000; may be repeated"
    add("--limit", action="append", default=[], type=_limit, metavar="NAME=VALUE", help=text)
    text = "seconds that running requests have to end in on SIGTERM or Ctrl-C; a second one ends them (default: 30)"
    add("--drain", type=float, default=30.0, metavar="SECONDS", help=text)
    text = "engines, each in a process of its own, through Ray Serve (default: one, without Ray)"
    add("--replicas", type=int, metavar="N", help=text)
    text = "as many as Ray may start while each has --max-rows requests (default: --replicas)"
    add("--max-replicas", type=int, metavar="N", help=text)
    add("--replica-cpus", type=float, default=1.0, metavar="N", help="CPU cores set aside for each (default: 1)")
    add("--replica-gpus", type=float, default=0.0, metavar="N", help="GPUs set aside for each (default: 0)")
    return parser


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; give a limit and its number") from None
    return name, number


def _adapter(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR; give a name and the folder of an adapter")
    return name, Path(folder)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):  # while loading; the server has handlers of its own
        signal.signal(number, _stop if options.replicas is None else _stop_replicas)
    try:
        tokens = _tokens(options.token_file)
        _check(options)
        needed = (*NEEDED, "ray") if options.replicas is not None else NEEDED
        missing = [module for module in needed if find_spec(module) is None]
        if missing:
            extra = "ray" if "ray" in needed else "serve"
            return refuse(COMMAND, f"{', '.join(missing)}: not installed; install with {INSTALL.format(extra)}")
        limits = _limits(options.limit)
        model = _name(options)
        with _bound(options.host, options.port) as bound, _application(options, model, limits, tokens) as app:
            _serve(options, app, model, bound)
    except InputError as error:
        return refuse(COMMAND, error, vars(options))
    return 0


@contextmanager
def _application(options: argparse.Namespace, model: str, limits, tokens: list[str]):
    common = {"model": model, "limits": limits, "tokens": tokens, "origins": options.cors, "drain": options.drain}
    _set_rows(options)
    engine = {
        key: getattr(options, key) for key in ("checkpoint", "device", "dtype", "compile", "max_rows", "quantize")
    }
    engine["adapters"] = {name: folder.resolve() for name, folder in options.adapter}  # replicas start elsewhere
    if options.replicas is None:
        from engine.runtime import Engine
        from engine.serving.app import create_app
        from engine.serving.async_engine import AsyncEngine

        served = AsyncEngine(Engine.from_pretrained(**engine), options.max_queue)
        yield create_app(served, warmup=options.warmup, **common)
    else:
        from engine.serving.ray_serve import Settings, running

        if options.checkpoint is not None and os.path.exists(options.checkpoint):  # else on the hub
            engine["checkpoint"] = options.checkpoint.resolve()  # replicas have other working folders
        settings = Settings(
            engine=engine,
            **common,
            warmup=options.warmup,
            max_queue=options.max_queue,
            replicas=options.replicas,
            max_replicas=options.max_replicas or options.replicas,
            cpus=options.replica_cpus,
            gpus=options.replica_gpus,
        )
        with running(settings) as app:
            yield app


def _set_rows(options: argparse.Namespace) -> None:
    """Sets `max_rows` and `warmup`, in samples, where they are not given.

    On a GPU each batch size is compiled separately, on a CPU compiled code serves them all.
    """
    from engine.device import resolve_device

    device = "cuda" if options.replica_gpus > 0 else "cpu"  # Ray hides the GPUs from replicas that ask for none
    if options.replicas is None:
        device = resolve_device(options.device).type
    if options.max_rows is None:
        options.max_rows = MAX_ROWS[device]
    if options.warmup is None:
        options.warmup = options.max_rows if options.compile and device == "cuda" else 1
    elif not 0 <= options.warmup <= options.max_rows:
        raise InputError("warmup", options.warmup, f"use 0 to max_rows, {options.max_rows}")


def _serve(options: argparse.Namespace, app, model: str, bound: socket.socket) -> None:
    import uvicorn

    from engine.serving.server import Server

    if options.replicas is not None:
        signal.signal(signal.SIGTERM, _stop_replicas)  # Ray has set its own
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # to stderr
    logging.getLogger("engine.serving").setLevel(logging.INFO)
    most = (options.max_rows + options.max_queue) * (options.max_replicas or options.replicas or 1) + CONNECTIONS
    config = uvicorn.Config(app, server_header=False, limit_concurrency=most, log_config=None)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{COMMAND}: {model} at http://{host}:{bound.getsockname()[1]}/", flush=True)
    Server(config, app.state.drain, options.drain).run([bound])


def _stop(*_) -> None:
    """Ends the process: an exception would pass through imports and destructors, some of which swallow it."""
    os._exit(0)


def _stop_replicas(*_) -> None:
    """Ends the process with an exception, so that Ray's processes are ended too."""
    sys.exit(0)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65_535:
        raise InputError("port", options.port, "use a number from 0 to 65535")
    if not 0 <= options.drain <= 3600:  # also NaN
        raise InputError("drain", options.drain, "use seconds from 0 to 3600")
    if options.max_queue < 0:
        raise InputError("max_queue", options.max_queue, "use a whole number from 0")
    if options.replicas is None and options.max_replicas is not None:
        raise InputError("max_replicas", options.max_replicas, "give replicas too", "needs replicas")
    least = 1 if options.replicas is None else options.replicas
    for key, lowest in {"replicas": 1, "max_replicas": least, "replica_cpus": 0, "replica_gpus": 0}.items():
        value = getattr(options, key)
        if value is not None and not lowest <= value <= 10_000:  # also NaN
            raise InputError(key, value, f"use a number from {lowest} to 10000")
    names = [name for name, _ in options.adapter]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError("adapter", repeated[0], "give each adapter another name", "is given twice")
    for origin in options.cors:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise InputError("cors", origin, "give scheme, host and port, such as https://example.org")


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address; it does not listen yet: clients are refused while the model loads."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        argument, value = ("host", host) if isinstance(error, socket.gaierror | UnicodeError) else ("port", port)
        raise InputError(argument, value, f"give another {argument}", f"cannot be used ({reason})") from None
    return bound


def _tokens(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError("token_file", file, "give a readable text file", f"cannot be read ({reason})") from None
    tokens = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
    if not tokens:
        raise InputError("token_file", file, "write a token into it", "holds no token")
    for number, token in tokens.items():
        if not (token.isascii() and token.isprintable()):  # clients encode other characters in different ways
            problem = f"has characters in line {number} that cannot be sent in a header"
            raise InputError("token_file", file, "use ASCII letters, digits and -._~+/=", problem)
    return list(tokens.values())


def _limits(given: list[tuple[str, float]]):
    from engine.serving.inputs import Limits

    known = {field.name: field.type for field in dataclasses.fields(Limits)}
    for key, value in given:
        if key not in known:
            raise InputError("limit", key, f"use one of {', '.join(known)}", "is not a limit")
        if not value >= 1 or value == float("inf") or (known[key] is int and value != int(value)):
            raise InputError("limit", f"{key}={value:g}", "use a number from 1")
    return Limits(**{key: known[key](value) for key, value in given})


def _name(options: argparse.Namespace) -> str:
    from engine.checkpoint import BUILT_IN

    return options.name or (options.checkpoint or BUILT_IN).resolve().name


if __name__ == "__main__":
    run(COMMAND, main)
