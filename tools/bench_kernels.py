#!/usr/bin/env python3
"""Times the KDA kernels beside other implementations: same inputs, one process, checked first.

Writes kernels_cpu or kernels_cuda (.json, .md, .png) into --output. A side whose results disagree
with float64, or with the others, gets no time, and the exit status is 1.

python tools/bench_kernels.py                                   # whole sequences
python tools/bench_kernels.py --shapes H64,K128,T8192 H96,T8x1024 --gate bounded
python tools/bench_kernels.py --only megakda transformers --repeats 20
python tools/bench_kernels.py --decode                          # decode steps; T is the context
python tools/bench_kernels.py --check-determinism 100           # equal bits, again and again
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""With glibc's defaults every large tensor is new memory from the system: sides with many
temporaries would be timed at zeroing pages."""

LENGTHS = "1300+547+2048+963+271+3063"
SHAPES = {
    "cpu": ("H4,K64,T512", "H4,K64,T2048", "H4,K64,T8192"),
    "cuda": (
        *(f"H{heads},T8192" for heads in (16, 32, 64, 96)),
        *(f"H{heads},T{lengths}" for heads in (16, 32, 64, 96) for lengths in ("8x1024", LENGTHS)),
        "H32,T2048",
        "H32,T32768",
    ),
}
DECODE_SHAPES = {
    "cpu": ("B1,H4,K64,T512", "B8,H4,K64,T512"),
    "cuda": ("B1,H32,T4096", "B8,H32,T4096", "B64,H32,T4096", "B128,H32,T4096", "B1,H32,T131072"),
}
GATES = {"cpu": "none", "cuda": "bounded"}
REPEATS = {"cpu": 7, "cuda": 50}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("error: TRITON_INTERPRET is set, and kernels would be interpreted: unset it")
        return 2
    from megakda.kernels.verify.bench import command

    device = args.device or command.default_device()
    shapes = args.shapes or (DECODE_SHAPES if args.decode else SHAPES)[device]
    options: dict[str, Any] = {
        "gate": args.gate or GATES[device],
        "repeats": args.repeats or REPEATS[device],
        "dtype": args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device],
    }
    try:
        settings = command.settings(
            device, shapes, args.only, seconds=args.seconds, memory=not args.no_memory, **options
        )
    except ValueError as error:
        print(f"error: {error}")
        return 2
    if args.threads:
        command.set_threads(args.threads)
    line = ["python", "tools/bench_kernels.py", *(sys.argv[1:] if argv is None else argv)]
    if args.check_determinism:
        return command.determinism(settings, args.check_determinism)
    name = args.name or f"kernels_{device}{'_decode' if args.decode else ''}"
    run = command.decode if args.decode else command.sequences
    return run(settings, args.output / f"{name}.json", line)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="B (1), H, K (128), V (K) and T joined by commas; T8x1024 and T1300+547 are packed",
    )
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="some sides; any name lists them")
    parser.add_argument(
        "--gate",
        choices=("none", "softplus", "bounded"),
        help="in the operator, with norm and sigmoid; none: all of them before it. Default: none "
        "on a CPU, bounded on a GPU",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="cpu fp32, cuda bf16")
    parser.add_argument("--repeats", type=int, help="default: 7 on a CPU, 50 on a GPU")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="then a side stops after 3 repeats (20)"
    )
    parser.add_argument("--threads", type=int, help="of torch on a CPU; default: torch's")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--decode", action="store_true", help="time decode steps instead")
    parser.add_argument(
        "--check-determinism", type=int, metavar="N", help="N runs have to give equal bits; no time"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--name", help="of the files; default: kernels_cpu and the like")
    return parser.parse_args(argv)


def _pin_malloc() -> None:
    """Starts this program again with glibc's allocator as all sides are to find it."""
    if sys.platform == "linux" and not MALLOC.items() <= os.environ.items():
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    _pin_malloc()
    sys.exit(main())
