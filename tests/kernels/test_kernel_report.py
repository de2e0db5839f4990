"""The kernels of training and inference, compiled for a GPU that is not there, at full size.

The other architectures are for `make kernel-report`, whenever a kernel changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megakda

ROOT = Path(megakda.__file__).resolve().parents[1]


@pytest.mark.timeout(1200)
def test_kernels_compile_within_their_budgets_and_no_worse_than_recorded() -> None:
    done = subprocess.run(
        [sys.executable, "tools/kernel_report.py", "--check", "--architectures", "sm_90"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 problems" in done.stdout
