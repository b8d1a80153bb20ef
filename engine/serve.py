"""The engine as a service over HTTP: `python -m engine.serve`; see `--help`, and README.md for examples.

Parse, load, serve: everything else is `engine.serving`. SIGTERM and Ctrl-C let what runs end, and then exit with 0.
"""

import argparse
import dataclasses
import logging
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from engine.command import Parser, name, path, refuse, run
from engine.errors import InputError

COMMAND = "python -m engine.serve"
INSTALL = "pip install 'psunet-engine[serve]'"
NEEDED = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
CONNECTIONS = 256  # beside those of requests that are served


def _parser() -> Parser:
    parser = Parser(COMMAND, description="Serve the engine over HTTP, with a page to try it out.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    text = "a folder that engine.train has written (default: the built-in model)"
    add("--checkpoint", type=path, metavar="DIR", help=text)
    add("--name", type=name, help="the model's name for clients (default: the checkpoint folder's)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, as measured)")
    add("--compile", action="store_true", help="compile the model, in the warm-up")
    add("--max-rows", type=int, default=64, metavar="N", help="samples computed together at most (default: 64)")
    add("--max-queue", type=int, default=256, metavar="N", help="further samples that may wait (default: 256)")
    text = "samples in the largest batch to warm up for, 0 for no warm-up (default: 1; with --compile: --max-rows)"
    add("--warmup", type=int, metavar="N", help=text)
    text = "a file of tokens, one a line; clients must send one of them (Authorization: Bearer …)"
    add("--token-file", type=path, metavar="FILE", help=text)
    text = "a page whose scripts may call the service, such as https://example.org; may be repeated"
    add("--cors", action="append", default=[], metavar="ORIGIN", help=text)
    text = "a limit of one request, as in /v1/models, such as num=8 or body_bytes=1000000; may be repeated"
    add("--limit", action="append", default=[], type=_limit, metavar="NAME=VALUE", help=text)
    text = "seconds that running requests have to end in on SIGTERM (default: 30)"
    add("--drain", type=float, default=30.0, metavar="SECONDS", help=text)
    return parser


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; give a limit and its number") from None
    return name, number


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)  # while loading; the server has handlers of its own, and then calls these
    signal.signal(signal.SIGINT, _stop)
    try:
        tokens = _tokens(options.token_file)
        _check(options)
        missing = [module for module in NEEDED if find_spec(module) is None]
        if missing:
            return refuse(COMMAND, f"{', '.join(missing)}: not installed; install with {INSTALL}")
        limits = _limits(options.limit)
        with _bound(options.host, options.port) as bound:
            engine, model = _engine(options)
            _serve(options, engine, model, limits, tokens, bound)
    except InputError as error:
        return refuse(COMMAND, error, vars(options))
    return 0


def _serve(options: argparse.Namespace, engine, model: str, limits, tokens: list[str], bound: socket.socket) -> None:
    import uvicorn

    from engine.serving.app import create_app

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # to stderr
    logging.getLogger("engine.serving").setLevel(logging.INFO)
    warmup = options.warmup if options.warmup is not None else options.max_rows if options.compile else 1
    app = create_app(
        engine, model=model, limits=limits, tokens=tokens, origins=options.cors, warmup=warmup, drain=options.drain
    )
    seconds = max(1, round(options.drain))
    most = options.max_rows + options.max_queue + CONNECTIONS
    config = uvicorn.Config(
        app, server_header=False, limit_concurrency=most, timeout_graceful_shutdown=seconds, log_config=None
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"{COMMAND}: {model} at http://{host}:{bound.getsockname()[1]}/", flush=True)
    uvicorn.Server(config).run([bound])


def _stop(*_) -> None:
    sys.exit(0)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65_535:
        raise InputError("port", options.port, "use a number from 0 to 65535")
    if not 0 <= options.drain <= 3600:  # also NaN
        raise InputError("drain", options.drain, "use seconds from 0 to 3600")
    if options.warmup is not None and not 0 <= options.warmup <= options.max_rows:
        raise InputError("warmup", options.warmup, f"use 0 to max_rows, {options.max_rows}")
    if options.max_queue < 0:
        raise InputError("max_queue", options.max_queue, "use a whole number from 0")
    for origin in options.cors:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise InputError("cors", origin, "give scheme, host and port, such as https://example.org")


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address; it does not listen yet, so that nobody waits while the model is loaded."""
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
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError("token_file", file, "give a readable text file", f"cannot be read ({reason})") from None
    tokens = [line for line in lines if line]
    if not tokens:
        raise InputError("token_file", file, "write a token into it", "holds no token")
    return tokens


def _limits(given: list[tuple[str, float]]):
    from engine.serving.inputs import Limits

    known = {field.name: field.type for field in dataclasses.fields(Limits)}
    for key, value in given:
        if key not in known:
            raise InputError("limit", key, f"use one of {', '.join(known)}", "is not a limit")
        if not value >= 1 or value == float("inf") or (known[key] is int and value != int(value)):
            raise InputError("limit", f"{key}={value:g}", "use a number from 1")
    return Limits(**{key: known[key](value) for key, value in given})


def _engine(options: argparse.Namespace):
    """The loaded engine and the model's name."""
    from engine.checkpoint import BUILT_IN
    from engine.runtime import Engine
    from engine.serving.async_engine import AsyncEngine

    engine = Engine.from_pretrained(
        options.checkpoint,
        device=options.device,
        dtype=options.dtype,
        compile=options.compile,
        max_rows=options.max_rows,
    )
    folder = (options.checkpoint or BUILT_IN).resolve()
    return AsyncEngine(engine, options.max_queue), options.name or folder.name


if __name__ == "__main__":
    run(COMMAND, main)
