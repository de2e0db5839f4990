#!/usr/bin/env python3
"""The whole way on two CPU ranks: text, training, a crash, resuming, an export, a sample, a plot.

python tools/quickstart.py [--out DIR] [override ...]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megakda.config import compose  # noqa: E402
from megakda.data.corpus import prepare_stdlib  # noqa: E402
from megakda.data.indexed import read_index, unigram_entropy  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402
from megakda.metrics.plot import plot_runs  # noqa: E402
from megakda.metrics.writers import read_metrics  # noqa: E402

RANKS = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", help="settings of the recipe to change")
    args = parser.parse_args(argv)
    try:
        quickstart(args.out, args.overrides)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"error: a step of the quickstart failed (exit code {error.returncode})")
        return 1
    return 0


def quickstart(out: Path, overrides: list[str]) -> None:
    """Runs every step, telling what it does."""
    started = time.monotonic()
    settings = ["experiment=quickstart", "parallel=ep2", f"train.out={out}", *overrides]
    config = compose(settings)
    train = config.train
    shutil.rmtree(out, ignore_errors=True)

    _say("1. Text: the Python standard library's own source, as bytes")
    prefix = Path(config.data.paths[0])
    prepare_stdlib(prefix.parent, config.data.tokenizer)
    tokens = read_index(prefix).tokens
    entropy = unigram_entropy(prefix)
    print(f"{tokens:,} tokens in {prefix}.bin; unigram entropy {entropy:.3f} nats per token")

    _say(f"2. Training on {RANKS} ranks, with experts split between them")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(RANKS), "-m", "megakda.train", *settings),
    ]
    print("torchrun", *command[3:], sep=" ", flush=True)
    crash_at = train.save_every + max(1, train.save_every // 4)
    _train_and_kill(command, out, crash_at)

    _say("3. Killed without warning. The same command resumes from the last checkpoint")
    subprocess.run(command, env=_environment(), check=True)

    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, train.steps + 1))
    loss = [row["valid_loss"] for row in rows if "valid_loss" in row][-1]
    _say("4. Result")
    print(
        f"validation loss {loss:.3f} nats per token ({loss / math.log(2):.2f} bits) against a "
        f"unigram entropy of {entropy:.3f}: {entropy - loss:.3f} below"
    )
    if loss > entropy - 0.5:
        raise MegakdaError(f"the model learned too little: {loss:.3f} against {entropy:.3f}")

    _say("5. An export in the published Hugging Face layout")
    exported = str(out / "hf")
    _tool("export_hf.py", "--checkpoint", str(out), "--out", exported)

    _say("6. A sample from the exported model")
    _tool("generate.py", exported, "--prompt", "def ")

    _say("7. A plot")
    print(plot_runs([out], out / "loss.png"))

    _say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. To try next")
    python = os.path.relpath(sys.executable)
    print(
        f"{python} -m megakda.train experiment=quickstart model.pattern=0:1 train.out=runs/mla\n"
        f"{python} tools/plot_run.py {out} runs/mla --out compare.png\n"
        f"{python} tools/generate.py {out} --prompt 'class ' --temperature 0.5\n"
        f"{python} tools/bench_inference.py --contexts 1024 8192\n"
        f"{python} tools/preprocess_data.py --help"
    )


def _train_and_kill(command: list[str], out: Path, step: int) -> None:
    """Starts training and kills every process of it once `step` steps are done."""
    process = subprocess.Popen(command, env=_environment())
    try:
        while process.poll() is None and _steps_done(out) < step:
            time.sleep(0.2)
        if process.returncode is not None:
            raise subprocess.CalledProcessError(process.returncode, command)
    finally:
        # torchrun puts its workers into sessions of their own: each has to be killed.
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        for member in family + [child for p in family for child in p.children(recursive=True)]:
            member.kill()
        process.wait()


def _tool(name: str, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    subprocess.run(command, env=_environment(), check=True)


def _steps_done(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def _environment() -> dict[str, str]:
    """CPU ranks of one thread each, and this checkout first on the path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def _say(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


if __name__ == "__main__":
    sys.exit(main())
