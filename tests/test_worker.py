"""The worker thread: when it starts, sleeps and ends, and what it computes with."""

import concurrent.futures
import contextvars
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from denoisers import SECONDS

import engine.sampling.worker as module
from engine.sampling.worker import Worker, finish_future

CLOSED = "this engine is closed"


class Doer:
    """Calls the functions that are posted, one a turn."""

    def __init__(self):
        self.inbox, self.aborted = deque(), []
        self.worker = Worker(self)

    def post(self, function):
        return self.worker.post(SimpleNamespace(function=function, future=Future()), self.inbox)

    def turn(self):
        if not self.inbox:
            return False
        item = self.inbox.popleft()
        finish_future(item.future, item.function())
        return True

    def abort(self, error):
        self.aborted.append(error)
        while self.inbox:
            finish_future(self.inbox.popleft().future, error=error)


@contextmanager
def doing():
    doer = Doer()
    try:
        yield doer
    finally:
        doer.worker.close()


def ended(thread):
    thread.join(SECONDS)
    return not thread.is_alive()


# --- The thread ----------------------------------------------------------------------------------------------------


def test_the_thread_starts_with_the_first_post_and_does_all_of_them():
    before = threading.active_count()
    with doing() as doer:
        assert threading.active_count() == before
        threads = [doer.post(threading.current_thread).result(SECONDS) for _ in range(3)]
        assert len({*threads}) == 1 and threads[0] is not threading.current_thread()
        assert threads[0].daemon, "a program whose main thread has ended does not wait for it"
    assert ended(threads[0])


def test_it_computes_without_gradients_with_as_many_threads_as_its_caller():
    before = torch.get_num_threads()
    with doing() as doer:
        assert doer.post(torch.is_inference_mode_enabled).result(SECONDS)
        try:
            for number in (3, 1, 2):
                torch.set_num_threads(number)
                assert doer.post(torch.get_num_threads).result(SECONDS) == number
        finally:
            torch.set_num_threads(before)
        assert not torch.is_inference_mode_enabled()


def test_it_has_the_context_variables_of_where_it_was_made():
    variable = contextvars.ContextVar("variable", default="elsewhere")
    variable.set("here")
    with doing() as doer, concurrent.futures.ThreadPoolExecutor(1) as pool:
        # A thread of another context makes the first post.
        future = pool.submit(lambda: (variable.get(), doer.post(variable.get).result(SECONDS)))
        assert future.result(SECONDS) == ("elsewhere", "here")


def test_a_fault_of_a_turn_ends_what_was_posted_and_the_thread_goes_on():
    with doing() as doer:
        go = threading.Event()
        first = doer.post(lambda: go.wait(SECONDS))
        fault, behind = doer.post(lambda: 1 / 0), doer.post(int)
        go.set()
        assert first.result(SECONDS)
        with pytest.raises(ZeroDivisionError):
            behind.result(SECONDS)
        assert doer.post(int).result(SECONDS) == 0
        assert [type(error) for error in doer.aborted] == [ZeroDivisionError] and not fault.done()


def test_closing_waits_for_the_turn_under_way_and_ends_what_is_left():
    with doing() as doer:
        go, began = threading.Event(), threading.Event()
        first = doer.post(lambda: began.set() or go.wait(SECONDS))
        second, thread = doer.post(int), doer.post(threading.current_thread)
        assert began.wait(SECONDS)
        closing = threading.Thread(target=doer.worker.close)
        closing.start()
        while not doer.worker.closed:
            pass
        assert not first.done() and closing.is_alive()
        go.set()
        assert ended(closing) and first.result(SECONDS)
        for future in (second, thread):
            with pytest.raises(RuntimeError, match=CLOSED):
                future.result(SECONDS)
        with pytest.raises(RuntimeError, match=CLOSED):
            doer.post(int)
        doer.worker.close()


def test_closing_waits_no_longer_than_it_is_told():
    go, began = threading.Event(), threading.Event()
    with doing() as doer:
        thread = doer.post(threading.current_thread).result(SECONDS)
        future = doer.post(lambda: began.set() or go.wait(SECONDS))
        assert began.wait(SECONDS)
        doer.worker.close(timeout=0.01)
        assert thread.is_alive() and not future.done()
        go.set()
        assert ended(thread)


def test_closing_while_the_thread_starts_ends_what_was_posted(monkeypatch):
    go, inference_mode = threading.Event(), torch.inference_mode

    def late():
        assert go.wait(SECONDS)
        return inference_mode()

    with doing() as doer:
        monkeypatch.setattr(module.torch, "inference_mode", late)
        future = doer.post(int)
        closing = threading.Thread(target=doer.worker.close)
        closing.start()
        while not doer.worker.closed:
            pass
        go.set()
        assert ended(closing)
        with pytest.raises(RuntimeError, match=CLOSED):
            future.result(0)


def test_the_thread_ends_with_its_owner():
    doer = Doer()
    thread, reference = doer.post(threading.current_thread).result(SECONDS), weakref.ref(doer)
    assert thread.is_alive()
    del doer
    gc.collect()
    assert ended(thread) and reference() is None


def test_an_owner_that_nobody_holds_does_what_was_posted_first():
    go = threading.Event()
    doer = Doer()
    doer.post(lambda: go.wait(SECONDS))
    future, reference = doer.post(threading.current_thread), weakref.ref(doer)
    del doer
    go.set()
    thread = future.result(SECONDS)
    assert ended(thread) and reference() is None


def test_a_worker_that_was_never_used_closes_and_is_freed():
    doer = Doer()
    reference = weakref.ref(doer.worker)
    doer.worker.close()
    with pytest.raises(RuntimeError, match=CLOSED):
        doer.post(int)
    del doer
    gc.collect()
    assert reference() is None


def test_the_thread_wakes_for_a_cancelled_future():
    with doing() as doer:
        turns, turned = [], threading.Semaphore(0)
        turn = doer.turn
        doer.turn = lambda: turns.append(1) or turned.release() or turn()
        future = doer.worker.post(SimpleNamespace(future=Future()), deque())  # an inbox that is not looked at
        assert turned.acquire(timeout=SECONDS)
        assert future.cancel() and turned.acquire(timeout=SECONDS)


# --- The process ---------------------------------------------------------------------------------------------------

PROCESS = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
import torch
from denoisers import FunctionDenoiser, table
from engine.config import Modality, ModelConfig
from engine.sampling.batch import SampleSpec
from engine.sampling.sampler import Sampler
from engine.sampling.worker import check_process

check_process()
model = ModelConfig((Modality("image", 3, 2, depth=0),), shared_depth=1, dim=64)
denoiser = FunctionDenoiser(lambda inputs, times, outputs: inputs * 0.5)
spec = lambda steps: SampleSpec(1, table(steps, 1), torch.ones(6, dtype=torch.bool), torch.zeros(6))
used, fresh = Sampler(denoiser, model, buckets=(1,)), Sampler(denoiser, model, buckets=(1,))
expected, report = used.run([spec(3)]), {}

reading, writing = os.pipe()
child = os.fork()
if child == 0:
    refused = []
    posts = [check_process]
    for sampler in (used, fresh):
        posts += [lambda s=sampler: s.submit([spec(3)]), lambda s=sampler: s.call(list, [1])]
    for post in posts:
        try:
            post()
        except RuntimeError as error:
            refused.append(str(error))
    used.close()
    os.write(writing, json.dumps({"refused": refused}).encode())
    sys.exit(3)
os.close(writing)
with os.fdopen(reading) as pipe:
    report["child"] = json.loads(pipe.read())
report["child"]["status"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
report["expected"], report["parent"] = expected.tolist(), used.run([spec(3)]).tolist()

futures = [sampler.submit([spec(1000)] * 20) for sampler in (used, fresh)]
while not fresh.forwards:
    time.sleep(0.001)
print(json.dumps(report))
for future in futures:
    future.add_done_callback(lambda done: print(done.exception()))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def process():
    """A process that forks, then ends while samples are under way: its exit code, reports and errors."""
    command = [sys.executable, "-c", PROCESS]
    paths = [path for path in sys.path if path]
    environment = {**module.os.environ, "PYTHONPATH": module.os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    report, *messages = done.stdout.splitlines() or ["{}"]
    return SimpleNamespace(code=done.returncode, errors=done.stderr, messages=messages, **json.loads(report))


def test_a_forked_process_is_refused_and_its_parent_goes_on(process):
    refused = "an engine was made before this process was forked; start processes with multiprocessing's spawn instead"
    assert process.child == {"refused": [refused] * 5, "status": 3}
    assert process.parent == process.expected


def test_a_process_that_ends_while_samples_are_under_way_ends_cleanly_with_its_exit_code(process):
    assert (process.code, process.errors) == (7, "")
    assert len(process.messages) == 2 and all(message.startswith(CLOSED) for message in process.messages)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process on Linux")
def test_openmp_threads_of_callers_and_of_an_idle_worker_end():
    """More of them than cores would slow each other down: see `end_idle_threads`."""
    program = """
import os, time, torch
from test_worker import doing

def threads():
    return len(os.listdir("/proc/self/task"))

def parallel():
    return torch.ones(1 << 20).add(1).sum().item() and threads()

torch.set_num_threads(3)
alone = threads()
assert parallel() == alone + 2, "PyTorch does not compute with OpenMP"
with doing() as doer:
    during = doer.post(parallel).result()
    until = time.monotonic() + 30
    while threads() > alone + 1 and time.monotonic() < until:
        time.sleep(0.01)
    print(during - alone, threads() - alone, parallel() - alone)
"""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if "does not compute with OpenMP" in done.stderr:
        pytest.skip("PyTorch does not compute with OpenMP here")
    assert done.stdout.split() == ["3", "1", "3"], done.stderr
