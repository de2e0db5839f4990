"""As for the kernels' own tests."""

from tests.kernels.conftest import memory_is_checked, triton_interpreter

__all__ = ["memory_is_checked", "triton_interpreter"]
