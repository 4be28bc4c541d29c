"""Parts on threads of their own: the same numbers, errors that arrive, and settings that are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import autodual
from autodual.bounds import pairs
from autodual.threads import evenly, in_threads, workers


@pytest.fixture
def three() -> Iterator[None]:
    """Let PyTorch use three threads for a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_parts_run_beside_each_other_without_derivatives_and_in_order(three):
    like, meeting = torch.zeros(1), threading.Barrier(3, timeout=60)

    def work(part: int) -> tuple[int, int, bool, bool]:
        meeting.wait()  # which no thread passes alone
        return part, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with torch.no_grad():
        assert in_threads(work, range(6), like) == [(part, 1, False, False) for part in range(6)]
    assert torch.get_num_threads() == 3
    with torch.inference_mode():
        assert in_threads(work, range(3), like) == [(part, 1, False, True) for part in range(3)]
    assert torch.get_num_threads() == 3


def test_one_thread_where_derivatives_are_wanted_or_there_are_few_parts(three):
    like, here = torch.zeros(1), threading.get_ident()
    assert workers(like) == 1
    assert in_threads(lambda _: threading.get_ident(), range(9), like) == [here] * 9
    with torch.no_grad():
        assert workers(like) == 3
        assert workers(torch.zeros(1, device="meta")) == 1
        assert in_threads(lambda _: threading.get_ident(), range(2), like) == [here] * 2


def test_an_error_arrives_and_threads_are_put_back(three):
    def work(part: int) -> int:
        if part == 4:
            raise ValueError("the fifth part")
        return part

    with torch.no_grad(), pytest.raises(ValueError, match="the fifth part"):
        in_threads(work, range(6), torch.zeros(1))
    assert torch.get_num_threads() == 3


def test_threads_that_start_meanwhile_have_the_usual_number(three):
    seen: list[int] = []

    def work(_: int) -> None:
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()

    with torch.no_grad():
        for _ in range(3):
            in_threads(work, range(6), torch.zeros(1))
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [3] * 19


SCRIPT = """
import threading, time, torch
from autodual.threads import in_threads

def job():
    time.sleep(0.5)
    with torch.no_grad():
        print(in_threads(lambda part: part + 1, range(4), torch.zeros(1)))

torch.set_num_threads(2)
threading.Thread(target=job).start()
"""


def test_work_is_done_though_the_main_thread_has_ended():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "[1, 2, 3, 4]", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(three):
    def work(part: int) -> int:
        return 2 * part

    with torch.no_grad():
        assert in_threads(work, range(6), torch.zeros(1)) == [0, 2, 4, 6, 8, 10]
        child = os.fork()
        if not child:
            os._exit(0 if in_threads(work, range(6), torch.zeros(1)) == [0, 2, 4, 6, 8, 10] else 1)
        for _ in range(600):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child did not end")
    assert status == 0


@pytest.mark.parametrize(
    ("count", "room", "threads"), [(0, 4, 2), (1, 4, 2), (7, 4, 2), (9, 4, 2), (9, 4, 3), (5, 0, 4), (100, 7, 1), (1000, 90, 3)]
)
def test_parts_are_even_and_fit(count, room, threads):
    size = evenly(count, room, threads)
    parts = [len(part) for part in torch.arange(count).split(max(size, 1))] if count else []
    assert sum(parts) == count
    assert max(parts, default=0) <= max(room, 1)
    least = -(-count // max(room, 1))
    assert len(parts) <= least + threads
    if least >= threads and count >= 4 * least * threads:
        assert len(parts) % threads == 0


@pytest.mark.parametrize("method", [autodual.Adaptive(), autodual.Optimized(3)], ids=["adaptive", "optimized"])
def test_bounds_are_those_of_one_thread(three, method, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 4),
    ).double()  # fmt: skip
    x, region, found, used = torch.rand(5, 2, 9, 9, dtype=torch.float64), autodual.LInf(0.1), [], set()
    monkeypatch.setattr(pairs, "PIECE", 2**14)
    walk = pairs.PairWalk._ends
    monkeypatch.setattr(pairs.PairWalk, "_ends", lambda *args: used.add(threading.get_ident()) or walk(*args))
    for threads in (3, 1):
        used.clear()
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(autodual.certify(model).bounds(x, region, method=method))
        assert (len(used) > 1) == (threads > 1)
    torch.testing.assert_close(found[0].lower, found[1].lower, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[0].upper, found[1].upper, rtol=0, atol=1e-10)
