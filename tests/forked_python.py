"""A `python` for tests of many commands: its processes are forked from one that has imported torch and diffusers.

    python forked_python.py PROGRAM

imports these once and writes PROGRAM, which takes `-m MODULE …` or `-c CODE …` as an interpreter does and whose
arguments, folder, environment and standard streams become those of a new child. When standard input is closed, it
kills its process group, of which the children are a part.
"""

import json
import os
import runpy
import select
import shlex
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType

CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(call)
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or 1))
"""


def serve(program: Path) -> list[str]:
    """Forks for each call; returns its arguments, in the child."""
    path = program.with_suffix(".socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client, written = program.with_suffix(".py"), program.with_suffix(".part")
        client.write_text(CLIENT.format(path=str(path)))
        written.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(client))} "$@"\n')
        written.chmod(0o755)
        written.rename(program)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children that wait for theirs leave no zombies
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os.killpg(0, signal.SIGKILL)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection:
        _, streams, *_ = socket.recv_fds(connection, 1, 3)
        arguments, folder, environment = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(str(status if status >= 0 else 128 - status).encode())  # as shells say signals
            os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Anew: those of the server remember what its own streams were.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def run(kind: str, what: str, *arguments: str) -> None:
    sys.path[0] = os.getcwd()
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))
    else:
        sys.exit(f"{kind} is neither -m nor -c")


if __name__ == "__main__":
    from engine.codecs.diffusers_import import import_diffusers

    import_diffusers("AutoencoderDC")
    run(*serve(Path(sys.argv[1])))
