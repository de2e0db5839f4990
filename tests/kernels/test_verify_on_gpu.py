"""Launches of CPU tensors on a GPU, for which any other device stands in here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakda.kernels.verify import on_gpu


def test_arguments_are_moved_and_results_come_back():
    base = torch.arange(12.0)
    x, y = base[2:8].view(2, 3).T, base[8:]  # two views of one storage
    leaf = torch.ones(3, requires_grad=True)
    seen: dict[str, Any] = {}

    def run(a: torch.Tensor, number: int, b: torch.Tensor, *, c: Any, d: Any, e: Any) -> str:
        seen.update(a=a, b=b, number=number, d=d)
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert a.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
        assert e.numel() == 0
        a += 100
        b.zero_()
        c *= 2
        return "kernel"

    moved = on_gpu.moved_launch(run, torch.device("cpu"))
    empty = torch.empty(0, 4)
    assert moved(x, 7, y, c=leaf, d=None, e=empty) == "kernel"
    assert seen["number"] == 7 and seen["d"] is None
    assert seen["a"].stride() == x.stride() and seen["a"].storage_offset() == 2
    assert base.tolist() == [0, 1, *range(102, 108), 0, 0, 0, 0]
    assert leaf.tolist() == [2, 2, 2] and leaf.requires_grad


def test_tensors_of_another_device_are_left_alone():
    x = torch.empty(4, device="meta")
    on_gpu.moved_launch(lambda a: None if a is x else pytest.fail(), torch.device("cpu"))(x)


def test_it_needs_a_gpu_and_compiled_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        on_gpu.install()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        on_gpu.install()
