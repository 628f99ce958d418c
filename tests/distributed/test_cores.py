"""Cores and threads of ranks."""

import os

import pytest
import ranks

from ddae.distributed import cores

PRINT_CORES = """
import os, torch
from ddae.distributed.cores import num_workers
from ddae.distributed.engine import start_process_group, stop_process_group
start_process_group(60)
print((sorted(os.sched_getaffinity(0)), torch.get_num_threads(), num_workers(None)), flush=True)
start_process_group(60)
stop_process_group()
"""


def of_ranks(count, before=""):
    """Return (cores, threads, workers) that each rank prints."""
    started = ranks.start(count, ["-c", before + PRINT_CORES])
    outputs = [each.communicate(timeout=120)[0] for each in started]
    ranks.remove_shared_memory(started[0].port)
    return [eval(output.strip().splitlines()[-1]) for output in outputs]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_two_ranks_get_cores_of_their_own():
    before = "import os; del os.environ['OMP_NUM_THREADS']\nfrom ddae.distributed import cores; cores.MIN_CORES = 1\n"
    (first, threads, workers), (second, _, _) = of_ranks(2, before)
    assert set(first).isdisjoint(second)
    assert len(first) == len(second) == len(os.sched_getaffinity(0)) // 2
    assert threads == workers == len(first)


def test_ranks_with_few_cores_are_not_bound():
    everything = sorted(os.sched_getaffinity(0))
    before = "import os; del os.environ['OMP_NUM_THREADS']\nfrom ddae.distributed import cores; cores.MIN_CORES = 999\n"
    assert of_ranks(2, before) == [(everything, *2 * (max(1, len(everything) // 2),))] * 2


def test_ranks_that_are_bound_already_keep_their_cores():
    core = min(os.sched_getaffinity(0))
    before = f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    assert of_ranks(2, before) == [([core], 1, 1)] * 2


def test_hardware_threads_of_a_core_stay_together(tmp_path, monkeypatch):
    for number in range(8):  # two sockets of two cores of two threads, numbered as Linux does
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number % 4 // 2}\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    assert [cores.share(set(range(8)), 4, part) for part in range(4)] == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert cores.share(set(range(8)), 2, 0) == {0, 1, 4, 5}
    assert cores.share({0, 1, 2}, 2, 1) == {1}  # what does not divide is left over


def test_number_of_workers(monkeypatch):
    monkeypatch.setattr(cores, "_own_cores", None)
    assert [cores.num_workers(each) for each in (None, 0, 3)] == [len(os.sched_getaffinity(0)), 0, 3]
    monkeypatch.setattr(cores, "_own_cores", 5)
    assert [cores.num_workers(each) for each in (None, 0, 3)] == [5, 0, 3]


def test_lists_of_cores():
    assert cores.parse_cores("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert cores.parse_cores("\n") == set()
