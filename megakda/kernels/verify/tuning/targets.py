"""What is tuned: for each kernel the sizes it is looked up with, the cases it runs in, the grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megakda.kernels.verify.tuning.tables import Config, When

_JIT_NAMES = {"mla_decode": "mla_decode_split_kernel"}


@dataclass(frozen=True, eq=False)
class Target:
    """One entry of the launch tables.

    Attributes:
        kernel: its name in the tables.
        when: the sizes that it is looked up with.
        cases: names in `cases.CASES`, all of which launch it with these sizes. The first one is
            compiled where there is no GPU.
        grid: values to try, by name; a candidate has one of each. Names that it lacks keep the
            value that the table has.
    """

    kernel: str
    when: When
    cases: tuple[str, ...]
    grid: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """For people and --only: kernel[K=128,...]."""
        return f"{self.kernel}[{','.join(f'{k}={v}' for k, v in self.when.items())}]"

    @property
    def jit_name(self) -> str:
        """Of the Triton function."""
        return _JIT_NAMES.get(self.kernel, f"{self.kernel}_kernel")

    def candidates(self, current: Config) -> Iterator[Config]:
        """All points of the grid but `current` itself."""
        for values in itertools.product(*self.grid.values()):
            candidate = {**current, **dict(zip(self.grid, values, strict=True))}
            if candidate != current:
                yield candidate


_TRAIN = (
    "kda_train_h32",
    "kda_train_h16",
    "kda_train_h64",
    "kda_train_h96_bounded",
    "kda_train_packed",
)
_HEAD: When = {"K": 128, "dtype": "bfloat16"}
_SQUARE: When = {"K": 128, "V": 128, "dtype": "bfloat16"}
_ROWS = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)}


def _mla(rows: int, paged: bool) -> Target:
    cases: tuple[str, ...] = ("mla_decode_h16_64",)
    if rows == 32:
        cases = ("mla_decode_h32_64", "mla_decode_h32_1")
    return Target(
        "mla_decode",
        {"BYTES": 2, "ROWS": rows, "PAGED": int(paged)},
        tuple(f"{case}_paged" if paged else case for case in cases),
        {
            "BLOCK_N": (32, 64),
            "PROGRAMS_PER_PROCESSOR": (1, 2, 4),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4),
        },
    )


TARGETS = (
    Target(
        "kda_state",
        _SQUARE,
        ("kda_prefill_h32", *_TRAIN),
        {"BV": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    ),
    Target(
        "kda_intra",
        _HEAD,
        ("kda_prefill_h32", *_TRAIN),
        {"BK": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    ),
    Target(
        "kda_grad",
        _SQUARE,
        _TRAIN,
        {"BK": (16, 32, 64), "BV": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1,)},
    ),
    Target(
        "kda_state_grad",
        _SQUARE,
        _TRAIN,
        {"BV": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    ),
    Target(
        "kda_state",
        {**_SQUARE, "V": 256},
        ("kda_train_long",),
        {"BV": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    ),
    Target(
        "kda_fold",
        {**_SQUARE, "dtype": "float32"},
        ("kda_train_long",),
        {"BV": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
    ),
    Target(
        "kda_decode_fused",
        {"elements": 128 * 128},
        ("kda_decode_fused_64", "kda_decode_fused_1"),
        {"num_warps": (2, 4, 8, 16), "num_stages": (1,)},
    ),
    Target(
        "kda_recurrent",
        {"BK": 128},
        ("kda_decode_64", "kda_decode_1", "kda_decode_drafts"),
        {"BV": (8, 16, 32, 64), "num_warps": (1, 2, 4), "num_stages": (1, 2)},
    ),
    *(_mla(rows, paged) for rows in (32, 16) for paged in (True, False)),
    Target(
        "mla_decode_merge",
        {},
        ("mla_decode_h32_1_paged", "mla_decode_h32_64_paged"),
        {"BLOCK": (2048, 4096, 8192), "num_warps": (2, 4, 8)},
    ),
    Target(
        "tile_attention",
        {"BYTES": 2, "LARGE": 0},
        ("tile_attention", "tile_attention_packed"),
        {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},
    ),
    Target(
        "short_conv_forward",
        {"W": 4},
        ("short_conv",),
        {"BT": (32, 64, 128), "BD": (128, 256, 512), "U": (4, 8), "num_warps": (1, 2, 4)},
    ),
    Target(
        "short_conv_backward",
        {"W": 4},
        ("short_conv",),
        {"BT": (32, 64, 128), "BD": (128, 256), "U": (4, 8), "num_warps": (1, 2, 4)},
    ),
    Target("short_conv_step", {"W": 4}, ("short_conv_step",), {"BD": (64, 128, 256, 512)}),
    Target("kda_gate_forward", {"K": 128}, ("gate_softplus", "gate_bounded"), _ROWS),
    Target("kda_gate_backward", {"K": 128}, ("gate_softplus", "gate_bounded"), _ROWS),
    Target("l2_norm_forward", {"BD": 128}, ("l2_norm",), _ROWS),
    Target("l2_norm_backward", {"BD": 128}, ("l2_norm",), _ROWS),
    Target("gated_norm_forward", {"BD": 128}, ("gated_norm",), _ROWS),
    Target("gated_norm_backward", {"BD": 128}, ("gated_norm",), _ROWS),
)
"""In order of value: what a training step spends most on comes first."""


def find_targets(names: list[str] | None) -> list[Target]:
    """The targets of the kernels named, or all.

    Raises:
        ValueError: an unknown kernel.
    """
    known = list(dict.fromkeys(target.kernel for target in TARGETS))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(known)}")
    return [target for target in TARGETS if not names or target.kernel in names]
