"""Every section of the kernel measurements runs, on a CPU with tiny sizes, and prints a figure for each size."""

import pytest
import torch

from benchmarks.gpu.micro import SECTIONS, SMALL, run_sections
from benchmarks.gpu.timing import Timer


@pytest.mark.parametrize("name", SECTIONS)
def test_section_prints_figures(name, capsys):
    run_sections([name], small=True)
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert printed.startswith(f"== {name}\n")
    figures = [line for line in printed.splitlines() if " ms, " in line or " us of CPU " in line]
    assert len(figures) >= len(SMALL.chunks) - 1


def test_medians_belong_to_their_work():
    timer = Timer(torch.device("cpu"), warm_ups=1, repeats=3)
    small, large = torch.ones(1), torch.ones(1 << 22)
    few, many = timer.medians([lambda: small.add_(1), lambda: large.add_(1)])
    assert few < many


def test_work_runs_as_often_as_it_is_timed():
    runs = []
    Timer(torch.device("cpu"), warm_ups=2, repeats=5).medians([lambda: runs.append(1)])
    assert len(runs) == 7
