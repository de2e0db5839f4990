"""The CPU runtime: what it rewrites, what it refuses, and that it touches nothing else."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import megakda
from megakda import runtime
from megakda.errors import ConfigError, RuntimeMismatch
from megakda.runtime import cpu, hook

PROGRAM = """
import json
import megakda.runtime
from megakda.runtime import cpu
megakda.runtime.install("cpu")
import megakda.trainer
print(json.dumps(cpu.RETARGETED))
"""

RETARGETED = {
    "dist_checkpointing/exchange_utils.py": [
        "_get_empty_tensor_for_exchange",
        "exchange_loaded_tensors_gather_rounds",
    ],
    "distributed/fsdp/mcore_fsdp_adapter.py": ["FullyShardedDataParallel._init_dist_index"],
    "distributed/fsdp/src/megatron_fsdp/fully_shard.py": ["fully_shard_model"],
    "distributed/fsdp/src/megatron_fsdp/mixed_precision.py": ["_fp8_quantize_fallback"],
    "distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py": [
        "MultiGroupUBRAllocator.__enter__",
        "MultiGroupUBRAllocator.__exit__",
        "ParamAndGradBuffer",
        "ParamAndGradBuffer._init_each_parameter_group_buffers",
    ],
    "distributed/fsdp/src/megatron_fsdp/utils.py": [
        "<module>",
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
    ],
    "distributed/param_and_grad_buffer.py": ["_ParamAndGradBuffer.__init__"],
    "distributed/torch_fully_sharded_data_parallel.py": ["TorchFullyShardedDataParallel.__init__"],
    "extensions/transformer_engine.py": ["TEGroupedLinear._decode_extra_state"],
    "fp8_utils.py": ["_quantize_param_shard_impl"],
    "fusions/fused_indices_converter.py": [
        "IndicesToMultihot.backward",
        "IndicesToMultihot.forward",
    ],
    "inference/contexts/fused_kv_append_kernel.py": ["triton_append_key_value_cache"],
    "nccl_allocator.py": [
        "MultiGroupMemPoolAllocator.__enter__",
        "MultiGroupMemPoolAllocator.__exit__",
        "deregister_mem_pool",
        "nccl_mem.__init__",
        "register_mem_pool",
    ],
    "optimizer/clip_grads.py": [
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
        "get_grad_norm_fp32",
    ],
    "optimizer/cpu_offloading/hybrid_optimizer.py": [
        "HybridDeviceOptimizer._move_new_state_to_right_device"
    ],
    "optimizer/distrib_optimizer.py": [
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ],
    "optimizer/grad_scaler.py": ["DynamicGradScaler.__init__", "MegatronGradScaler.__init__"],
    "optimizer/optimizer.py": [
        "FP32Optimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "MixedPrecisionOptimizer.__init__",
    ],
    "pipeline_parallel/combined_1f1b.py": ["combined_forward_backward_step"],
    "pipeline_parallel/fine_grained_activation_offload.py": ["GPUTensorPool"],
    "pipeline_parallel/hybrid_cp_schedule.py": ["hybrid_context_parallel_forward_backward"],
    "pipeline_parallel/schedules.py": [
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
        "forward_step",
    ],
    "pipeline_parallel/utils.py": ["set_streams"],
    "rerun_state_machine.py": ["RerunStateMachine._reduce_any"],
    "tensor_parallel/data.py": ["_build_key_size_numel_dictionaries"],
    "tensor_parallel/layers.py": ["<module>"],
    "tensor_parallel/random.py": ["<module>", "_get_cuda_rng_state", "_set_cuda_rng_state"],
    "transformer/fsdp_dtensor_checkpoint.py": ["validate_loaded_state_dict"],
    "transformer/moe/moe_utils.py": ["track_moe_metrics"],
    "transformer/moe/token_dispatcher.py": ["MoEAlltoAllTokenDispatcher.__init__"],
    "transformer/utils.py": ["get_default_causal_mask", "get_sliding_window_causal_mask"],
    "utils.py": [
        "GlobalSymmetricMemoryBuffer.__init__",
        "get_batch_on_this_hybrid_cp_rank",
        "local_multi_tensor_l2_norm",
    ],
}
"""Functions with CUDA literals, by file of megatron-core. Read a new one before adding it here: on
the CPU's path, another literal may not be all that it needs."""


def entries(functions: dict[str, list[str]]) -> set[str]:
    """What `cpu.RETARGETED` says of `functions`: Python 3.10 knows no qualified names."""
    short = sys.version_info < (3, 11)
    return {
        f"{file}:{name.split('.')[-1] if short else name}"
        for file, names in functions.items()
        for name in names
    }


def test_the_rewritten_functions_are_the_known_ones():
    """A change of megatron-core that adds or drops a CUDA literal is seen here."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(megakda.__file__).parents[1])},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == entries(RETARGETED)


SOURCE = """
def outer(device="cuda"):
    kinds = ("torch.cuda.FloatTensor", ("cuda", 1))
    class Inner:
        def method(self):
            return "cuda"
    return device, kinds, Inner().method(), ["cuda:0", "torch.cuda.Stream", "no cuda"]

def other():
    return "cpu", ("cuda_graph", 2)
"""


def test_retarget_reaches_nested_functions_and_tuples_and_nothing_else(monkeypatch):
    monkeypatch.setattr(cpu, "RETARGETED", [])
    code = compile(SOURCE, "/lib/megatron/core/a/b.py", "exec")
    found = {}
    exec(cpu.retarget(code), found)
    assert found["outer"]() == (
        "cpu",
        ("torch.FloatTensor", ("cpu", 1)),
        "cpu",
        ["cuda:0", "torch.cuda.Stream", "no cuda"],
    )
    assert found["other"]() == ("cpu", ("cuda_graph", 2))
    # The default of `device` is a constant of the module.
    touched = ["<module>", "outer", "outer.<locals>.Inner.method"]
    assert set(cpu.RETARGETED) == entries({"a/b.py": touched})
    original = {}
    exec(code, original)
    assert original["outer"]()[0] == "cuda"


def test_installing_again_changes_nothing(monkeypatch):
    finders = [f for f in sys.meta_path if isinstance(f, hook._Finder)]
    assert len(finders) == 1
    for device in ("cpu", "auto"):
        assert runtime.install(device) == torch.device("cpu")
    with pytest.raises(ConfigError, match="TransformerEngine is not installed"):
        runtime.install("cpu", backend="transformer_engine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # now it is
    with pytest.raises(RuntimeMismatch, match=r"cannot change to .*transformer_engine"):
        runtime.install("cpu", backend="transformer_engine")
    assert [f for f in sys.meta_path if isinstance(f, hook._Finder)] == finders


def test_a_missing_gpu_and_a_gpu_in_the_way_are_config_errors(monkeypatch):
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda.*no GPU.*runtime\.device=auto"):
        runtime.install("cuda")
    monkeypatch.setattr(runtime, "_installed", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"runtime\.device=cpu.*CUDA_VISIBLE_DEVICES"):
        runtime.install("cpu")


@pytest.fixture
def not_installed(monkeypatch):
    """As before the first `install`, which must fail before it changes anything."""
    monkeypatch.setattr(runtime, "_installed", None)
    for module in (cpu, hook):
        monkeypatch.setattr(module, "install", lambda *args, **kwargs: pytest.fail("installed"))
    yield
    assert runtime._installed is None


@pytest.mark.usefixtures("not_installed")
def test_another_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(RuntimeMismatch, match=r"0\.17\.0 is installed.*megatron-core==0\.16\.1"):
        runtime.install("cpu")


@pytest.mark.usefixtures("not_installed")
def test_no_megatron_core_is_refused(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeMismatch, match=r"not installed: pip install megatron-core==0"):
        runtime.install("cpu")


@pytest.mark.usefixtures("not_installed")
def test_megatron_core_imported_first_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    with pytest.raises(RuntimeMismatch, match="imported before.*call install.. first"):
        runtime.install("cpu")


def test_a_symbol_that_is_gone_is_named():
    module = ModuleType("megatron.core.jit")
    module.here = 1
    with pytest.raises(RuntimeMismatch, match=r"megatron\.core\.jit\.gone is gone"):
        hook.apply(module, {"gone": 2})
    assert not hasattr(module, "gone")
    hook.apply(module, {"here": 2})
    assert module.here == 2


def test_merge_applies_both_patches_of_a_module_in_order():
    calls = []

    def patch(name, **replacements):
        return lambda module: calls.append((name, module)) or replacements

    merged = hook.merge(
        {"a": patch("first a", x=1, y=1), "b": patch("first b", x=3)},
        {"a": patch("second a", y=2), "c": patch("second c", x=4)},
    )
    assert merged.keys() == {"a", "b", "c"}
    module = ModuleType("a")
    assert merged["a"](module) == {"x": 1, "y": 2}
    assert calls == [("first a", module), ("second a", module)]
    assert (merged["b"](module), merged["c"](module)) == ({"x": 3}, {"x": 4})


@pytest.fixture
def fake_core(tmp_path, monkeypatch):
    """A package that the hook takes for megatron-core, and one whose name begins the same."""
    for name in ("fakecore", "fakecore_extra"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "a.py").write_text("def where():\n    return 'cuda'\n\nCOUNT = 1\n")
        (package / "b.py").write_text(f"from {name}.a import COUNT, where\n")
    monkeypatch.setattr(hook, "ROOT", "fakecore")
    monkeypatch.setattr(cpu, "RETARGETED", [])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.startswith("fakecore")]:
        del sys.modules[name]


@pytest.mark.usefixtures("fake_core")
def test_the_hook_adapts_modules_below_its_root_before_others_import_from_them():
    hook.install({"a": lambda module: {"COUNT": module.COUNT + 1}}, rewrite=cpu.retarget)
    adapted = importlib.import_module("fakecore.b")
    assert (adapted.COUNT, adapted.where()) == (2, "cpu")
    other = importlib.import_module("fakecore_extra.b")
    assert (other.COUNT, other.where()) == (1, "cuda")


@pytest.mark.usefixtures("fake_core")
def test_the_import_of_a_module_without_the_patched_symbol_fails():
    hook.install({"a": lambda module: {"TOTAL": 2}})
    with pytest.raises(RuntimeMismatch, match=r"fakecore\.a\.TOTAL is gone"):
        importlib.import_module("fakecore.b")
