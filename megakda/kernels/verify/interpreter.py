"""TRITON_INTERPRET=1 made faithful, so that kernels can be tested on CPU tensors.

Triton's interpreter runs each program of a launch in Python, on numpy arrays. Left as it is, it
keeps bf16 numbers as uint16 and does arithmetic on those bits, truncates where a GPU rounds, gives
Python integers as loop variables, knows no TF32, and hides a kernel's exception behind its own.
`install` puts that right for triton 3.6 to 3.9. What still differs from a GPU: the order in which
sums are taken, the last bit of exp and the like, and that programs run one after the other.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.errors import InterpreterError

from megakda.kernels.verify.rounding import (
    Array,
    bf16_to_float,
    float_to_bf16,
    multiply_split,
    round_to_bf16,
    round_to_tf32,
    truncate_to_tf32,
)

NEEDED = {
    "": (
        "interpreter_builder interpreter_semantic InterpreterBuilder TensorHandle GridExecutor "
        "InterpretedFunction FunctionRewriter ASTTransformer ReduceOps ScanOps _patch_lang "
        "_patch_lang_tensor _implicit_cvt _ir"
    ),
    "InterpreterBuilder": (
        "set_grid_idx create_masked_load create_masked_store create_atomic_rmw create_atomic_cas "
        "cast_impl create_fp_to_fp binary_op ternary_op unary_op create_clampf create_fma "
        "create_minnumf create_maxnumf create_minimumf create_maximumf create_dot create_addptr "
        "create_splat create_broadcast create_expand_dims create_bitcast"
    ),
    "GridExecutor": "_init_args_hst __call__",
    "InterpretedFunction": "rewritten_fn rewrite __call__",
    "FunctionRewriter": "ast_transformer",
}
"""What is replaced or called in triton.runtime.interpreter."""


class Observer:
    """Told of every launch, program and access to global memory; see `observed_by`."""

    def launch_begins(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Before the first program; `arguments` by name, tensors among them."""

    def program_begins(self, program: tuple[int, int, int]) -> None:
        """Before each program."""

    def load(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        """Elements of `size` bytes are read at these addresses, those of masked lanes left out.

        `tensor` is the argument that the pointers were made from, None where that got lost.
        """

    def store(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        """As `load`, for elements that are written; an atomic operation counts as a store."""

    def launch_ends(self) -> None:
        """After the last program; not after an exception."""


observers: list[Observer] = []
"""Those that are told; `observed_by` adds to them."""

_installed = False


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Within the block, `observer` is told what interpreted kernels do.

    Raises:
        RuntimeError: `install` was not called.
    """
    if not _installed:
        raise RuntimeError("megakda.kernels.verify.interpreter.install() must be called first")
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def install() -> None:
    """Corrects the interpreter of this process. Calls after the first do nothing.

    Raises:
        RuntimeError: triton was imported while TRITON_INTERPRET was not "1", or it is a version
            whose interpreter lacks something that is corrected here.
    """
    global _installed
    if _installed:
        return
    if os.environ.get("TRITON_INTERPRET") != "1" or not isinstance(
        tl.cdiv, stock.InterpretedFunction
    ):
        raise RuntimeError(
            "TRITON_INTERPRET=1 must be in the environment before triton is first imported"
        )
    _check_triton()
    stock.InterpreterBuilder = Builder
    stock.interpreter_builder.__class__ = Builder
    options = stock.interpreter_builder.options
    stock.interpreter_builder.options = dataclasses.replace(
        options,
        allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
        sanitize_overflow=False,  # costs five operations for each on integers, and reports nothing
    )
    stock.GridExecutor = Executor
    stock.ReduceOps, stock.ScanOps = Reduce, Scan
    stock.FunctionRewriter.ast_transformer = Transformer()
    stock._interpreted_range = interpreted_range  # found there by rewritten kernels
    stock.InterpretedFunction.rewritten_fn.clear()
    stock.InterpretedFunction.__call__ = call_device_function
    stock._patch_lang_tensor = patch_tensor
    stock._implicit_cvt = convert_argument
    _installed = True


def _check_triton() -> None:
    missing = [
        f"{owner}.{name}".lstrip(".")
        for owner, names in NEEDED.items()
        for name in names.split()
        if not hasattr(getattr(stock, owner) if owner else stock, name)
    ]
    if missing:
        raise RuntimeError(
            f"triton {triton.__version__}: triton.runtime.interpreter has no {', '.join(missing)}; "
            "the corrections are written for 3.6 to 3.9 and need to be looked at again"
        )


def _is_bf16(handle: Any) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    """A bf16 handle as float32, any other as it is."""
    if _is_bf16(handle):
        return stock.TensorHandle(bf16_to_float(handle.data), tl.float32)
    return handle


def _narrow(handle: Any) -> Any:
    return stock.TensorHandle(float_to_bf16(handle.data), tl.bfloat16)


class Builder(stock.InterpreterBuilder):
    """The operations of kernels. Those on bf16 are done in float32, and the result is rounded."""

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src)
        return super().cast_impl(_widen(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        nearest = rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE)
        widths = (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth)
        if nearest and min(widths) >= 16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value):
        return stock.TensorHandle(float_to_bf16(np.array([value])), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        result = super().binary_op(_widen(lhs), _widen(rhs), op)
        if result.data.dtype == np.bool_:  # a comparison, which is labelled with its operands' type
            return stock.TensorHandle(result.data, tl.int1)
        return _narrow(result) if _is_bf16(lhs) else result

    def unary_op(self, arg, op):
        result = super().unary_op(_widen(arg), op)
        return _narrow(result) if _is_bf16(arg) else result

    def create_fma(self, x, y, z):
        result = super().create_fma(_widen(x), _widen(y), _widen(z))
        return _narrow(result) if _is_bf16(z) else result

    def create_fneg(self, arg):
        return self.unary_op(arg, np.negative)

    # Without NaN propagation the other operand is taken; triton 3.6 propagates.
    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == stock._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.create_minimumf(self.create_maximumf(arg, lo), hi)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = _widen(a), _widen(b)
        precision = stock._ir.INPUT_PRECISION
        rounding: Callable[[Any], Any]
        if a.data.dtype != np.float32 or input_precision == precision.IEEE:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        terms, rounding = {
            precision.TF32: (1, truncate_to_tf32),  # handed to the tensor core as they are
            precision.TF32x3: (2, round_to_tf32),
            precision.BF16x3: (2, round_to_bf16),
            precision.BF16x6: (3, round_to_bf16),
        }[input_precision]
        product = multiply_split(a.data, b.data, terms, rounding)
        return stock.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        if _is_bf16(val):
            raise NotImplementedError("atomics on bf16 are not interpreted")
        self._observe("store", ptr, mask)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._observe("store", ptr, None)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    # Every load and store of a kernel ends in these two; later parameters vary with the version.
    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        self._observe("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        self._observe("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(x, y, z)
        for observer in observers:
            observer.program_begins((x, y, z))

    def _observe(self, event: str, ptrs: Any, mask: Any) -> None:
        if not observers:
            return
        addresses = np.asarray(ptrs.data)
        if mask is not None:
            keep = mask if isinstance(mask, np.ndarray) else mask.data
            if not keep.all():
                addresses = addresses[np.broadcast_to(keep, addresses.shape)]
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        tensor = ptrs.attr.get("tensor")
        for observer in observers:
            getattr(observer, event)(addresses.reshape(-1), size, tensor)

    # What is made of a pointer belongs to the same tensor.
    def create_addptr(self, ptr, offset):
        return _inherit(super().create_addptr(ptr, offset), ptr)

    def create_splat(self, ret_ty, arg):
        return _inherit(super().create_splat(ret_ty, arg), arg)

    def create_broadcast(self, arg, shape):
        return _inherit(super().create_broadcast(arg, shape), arg)

    def create_expand_dims(self, arg, axis):
        return _inherit(super().create_expand_dims(arg, axis), arg)

    def create_bitcast(self, src, dst_type):
        return _inherit(super().create_bitcast(src, dst_type), src)


def _inherit(result: Any, source: Any) -> Any:
    if "tensor" in source.attr:
        result.attr["tensor"] = source.attr["tensor"]
    return result


def _apply_widened(apply: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A reduction or scan, with bf16 inputs as float32 and their results rounded."""
    narrow = [x.dtype == tl.bfloat16 for x in inputs]
    if not any(narrow):
        return apply(inputs)
    wide = tuple(_retyped(x, _widen(x.handle)) for x in inputs)
    return tuple(
        _retyped(x, _narrow(x.handle)) if was_narrow and x.dtype == tl.float32 else x
        for x, was_narrow in zip(apply(wide), narrow, strict=False)
    )


def _retyped(x: Any, handle: Any) -> Any:
    """A tensor of x's shape around `handle`."""
    kind = tl.block_type(handle.dtype, list(x.shape)) if x.shape else handle.dtype
    return tl.core.tensor(handle, kind)


class Reduce(stock.ReduceOps):
    def apply(self, input):
        if not isinstance(input, tuple):
            return self.apply((input,))[0]
        return _apply_widened(super().apply, input)


class Scan(stock.ScanOps):
    def apply(self, input):
        if not isinstance(input, tuple):
            return self.apply((input,))[0]
        return _apply_widened(super().apply, input)


class Transformer(stock.ASTTransformer):
    """Rewrites loops over range and tl.range: their variable is a tensor, as when compiled."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        call = node.iter
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "range":
            call.func = ast.copy_location(ast.Name("_interpreted_range", ast.Load()), call.func)
        return node


def interpreted_range(
    start: Any, stop: Any = None, step: Any = None, **options: Any
) -> Iterator[Any]:
    """The loop variables of range(...) or tl.range(...) in a kernel; `options` guide compilers."""
    if stop is None:
        start, stop = 0, start
    bounds = [x for x in (start, stop, step) if x is not None]
    wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in bounds)
    dtype = tl.int64 if wide else tl.int32
    for i in range(*(int(getattr(x, "value", x)) for x in bounds)):
        yield stock.interpreter_semantic.scalar_constant(i, dtype)


class Executor(stock.GridExecutor):
    """One launch: observed, without numpy's warnings, and raising what the kernel raised."""

    def _init_args_hst(self, args_dev, kwargs):
        args, keywords = super()._init_args_hst(args_dev, kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | keywords
        for observer in observers:
            observer.launch_begins(self.fn.__name__, arguments)
        return args, keywords

    def __call__(self, *args, **kwargs):
        _patched.clear()
        try:
            # Overflow and NaN are values to a GPU, not events.
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
            for observer in observers:
                observer.launch_ends()
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


_patched: set[int] = set()
"""Modules whose view of triton.language has been patched in the launch that runs."""


def call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A jitted function called by a kernel. Patches each module once a launch, not at each call."""
    module = id(function.fn.__globals__)
    if module not in _patched:
        stock._patch_lang(function.fn)
        _patched.add(module)
    return function.rewrite()(*args, **kwargs)


_stock_convert_argument = stock._implicit_cvt


def convert_argument(argument: Any) -> Any:
    """As in triton; the pointer to a tensor also remembers the tensor."""
    converted = _stock_convert_argument(argument)
    if isinstance(argument, torch.Tensor):
        converted.handle.attr["tensor"] = argument
    return converted


_stock_patch_tensor = stock._patch_lang_tensor


def patch_tensor(tensor: Any, scope: Any) -> None:
    """As in triton; numbers of one element also become an index where triton 3.6 fails."""
    _stock_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))
