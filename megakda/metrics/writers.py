"""Where a run's numbers go: always ``metrics.jsonl``, on request TensorBoard and Weights & Biases.

``metrics.jsonl`` holds one JSON object per line, in the order written, and is the source for
`megakda.metrics.plot`. A value that is not finite is written as null, and the row then lists the
names of such values under ``nonfinite``, because NaN is not JSON. Only one process of a run may
write.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from megakda.config.schema import LoggingConfig
from megakda.errors import ConfigError, MegakdaError

METRICS_FILE = "metrics.jsonl"
PREVIOUS_METRICS_FILE = "metrics.previous.jsonl"
WANDB_ID_FILE = "wandb_id"
TENSORBOARD_DIR = "tensorboard"


class Writer(Protocol):
    """One destination of metrics."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Flush and release files. Calling it again does nothing."""


def _plain(value: Any) -> Any:
    """The value as None, bool, int, float, str, list and dict; arrays and tensors become lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, arrays and scalars, without importing either
        return value.tolist()
    return value


def _finite(value: Any, name: str, nonfinite: list[str]) -> Any:
    """The value with null for NaN and infinities, whose names are appended to ``nonfinite``."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}/{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{name}/{i}", nonfinite) for i, item in enumerate(value)]
    return value


def flatten(metrics: Mapping[str, Any]) -> dict[str, float | list[float]]:
    """Nested metrics as one level, names joined with "/".

    Values are numbers or lists of numbers (a distribution, such as one value per head). Lists of
    anything else get their index as a name. Text and null are left out.
    """
    flat: dict[str, float | list[float]] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                visit(f"{name}/{key}", item)
        elif isinstance(value, list):
            if all(isinstance(item, (int, float)) for item in value):
                flat[name] = value
            else:
                for index, item in enumerate(value):
                    visit(f"{name}/{index}", item)
        elif isinstance(value, (int, float)):
            flat[name] = value

    for key, item in metrics.items():
        visit(str(key), _plain(item))
    return flat


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _rows(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines with their rows. A last line cut short by a killed run is passed over."""
    torn: int | None = None
    for number, line in enumerate(lines, start=1):
        if torn is not None:
            raise MegakdaError(
                f"{path}, line {torn}: not a JSON object with a whole-number step, and not the "
                "last line, which alone may be torn; delete the line."
            )
        row = _parse(line)
        if row is None:
            torn = number
        else:
            yield line, row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``, without a torn last line.

    Raises `MegakdaError` if any other line is not a row, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        return [row for _, row in _rows(path, file)]


class JsonlWriter:
    """Appends rows to a file of JSON lines, each handed to the system before `write` returns."""

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """Open ``path`` for appending, creating it if need be, after `truncate_after`(keep_until).

        Raises `MegakdaError` if an existing file holds lines that are not rows.
        """
        self.path = path
        self.truncate_after(keep_until)

    def truncate_after(self, step: int | None) -> None:
        """Drop the rows of steps after ``step`` (None: no rows) and a torn last line.

        For resuming: a killed run has written rows past its last checkpoint, and the resumed run
        writes them again. The file changes in one rename or not at all.

        Raises `MegakdaError` if the file holds lines that are not rows.
        """
        self.close()
        if self.path.exists():
            self._rewrite(step)
        self._file = self.path.open("a", encoding="utf-8")

    def _rewrite(self, step: int | None) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        before, after = self.path.stat().st_size, 0
        with self.path.open("rb") as old, temporary.open("wb") as new:
            for line, row in _rows(self.path, old):
                if step is None or row["step"] <= step:
                    # A complete row can still lack its newline; the next row must not join it.
                    after += new.write(line if line.endswith(b"\n") else line + b"\n")
            new.flush()
            os.fsync(new.fileno())
        if after == before:  # nothing dropped, nothing mended
            temporary.unlink()
        else:
            os.replace(temporary, self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row: ``step`` and the metrics, nested as given."""
        row: dict[str, Any] = {"step": step}
        nonfinite: list[str] = []
        for key, value in metrics.items():
            if key != "step":
                row[key] = _finite(_plain(value), key, nonfinite)
        if nonfinite:
            row["nonfinite"] = nonfinite
        # One write call per row, so that a kill can tear a line but not mix two.
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "logging.tensorboard=True: needs the tensorboard package, which is not installed "
            f"({error}); pip install tensorboard, or set logging.tensorboard=false."
        ) from error
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "logging.wandb=True: needs the wandb package, which is not installed "
            f"({error}); pip install wandb, or set logging.wandb=false."
        ) from error
    return wandb


class TensorBoardWriter:
    """Writes scalars, and lists of numbers as histograms, to TensorBoard event files."""

    def __init__(self, folder: Path, config_dict: Mapping[str, Any], resume_step: int) -> None:
        """Open event files in ``folder``; TensorBoard then hides events after ``resume_step``.

        Raises `ConfigError` if the tensorboard package is missing.
        """
        summary_writer = _import_tensorboard()
        self._writer = summary_writer(
            str(folder), purge_step=resume_step + 1 if resume_step else 0, flush_secs=30
        )
        text = json.dumps(config_dict, indent=2, default=str)
        # Markdown shows a text block that is indented by four as it is.
        self._writer.add_text("config", "    " + text.replace("\n", "\n    "), resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers as scalars and lists of numbers as histograms."""
        for name, value in flatten(metrics).items():
            if name == "step":
                continue
            if isinstance(value, list):
                finite = [item for item in value if math.isfinite(item)]
                if finite:
                    self._writer.add_histogram(name, np.asarray(finite), step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file. Calling it again does nothing."""
        self._writer.close()


def wandb_mode(environ: Mapping[str, str] | None = None) -> str:
    """The mode to start Weights & Biases in: ``WANDB_MODE``, else online only when logged in.

    Logged in means that ``WANDB_API_KEY`` is set or that the netrc file has an entry for the
    server (``WANDB_BASE_URL``, by default api.wandb.ai). Otherwise "offline": a run must not stop
    at a login prompt, and ``wandb sync`` can upload it later.
    """
    environ = os.environ if environ is None else environ
    if environ.get("WANDB_MODE"):
        return environ["WANDB_MODE"]
    if environ.get("WANDB_API_KEY"):
        return "online"
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    home = Path(environ.get("HOME") or Path.home())
    named = environ.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return "online"
        except (OSError, netrc.NetrcParseError):
            continue
    return "offline"


class WandbWriter:
    """Writes to a Weights & Biases run. The output folder keeps its id, so that resumes join it."""

    def __init__(
        self,
        logging_cfg: LoggingConfig,
        out: Path,
        config_dict: Mapping[str, Any],
        resume_step: int,
    ) -> None:
        """Start or rejoin the run. Its local files go to ``out/wandb``, its id to ``out/wandb_id``.

        Raises `ConfigError` if the wandb package is missing.
        """
        wandb = _import_wandb()
        self._histogram = wandb.Histogram
        id_file = out / WANDB_ID_FILE
        if resume_step and id_file.exists():
            run_id = id_file.read_text().strip()
        else:
            run_id = secrets.token_hex(4)
            id_file.write_text(run_id + "\n")
        self._run = wandb.init(
            project=logging_cfg.wandb_project,
            name=logging_cfg.wandb_name,
            config=dict(config_dict),
            dir=str(out),
            id=run_id,
            mode=wandb_mode(),
            resume="allow",  # offline too: `wandb sync` joins the parts of one id in order
        )
        # The service refuses steps that go back, which a resumed run does when the killed one got
        # past its checkpoint. So the training step is a metric, and the axis of all the others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers as they are and lists of numbers as histograms."""
        row: dict[str, Any] = {}
        for name, value in flatten(metrics).items():
            if isinstance(value, list):
                finite = [item for item in value if math.isfinite(item)]
                if finite:
                    row[name] = self._histogram(finite)
            else:
                row[name] = value
        row["step"] = step
        self._run.log(row)

    def close(self) -> None:
        """Finish the run; online, this waits for the upload. Calling it again does nothing."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class MetricWriters:
    """Hands every row to all writers. A context manager that closes them."""

    def __init__(self, writers: Iterable[Writer]) -> None:
        self.writers = list(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step: numbers, lists of numbers, or nested dicts of those.

        NumPy and torch values are fine; they are copied to the host.
        """
        metrics = _plain(metrics)
        for writer in self.writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Flush and close all writers, the later ones also if an earlier one fails."""
        errors: list[Exception] = []
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:  # the first one is raised once all had their turn
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_writers(
    logging_cfg: LoggingConfig, out: Path, config_dict: Mapping[str, Any], resume_step: int
) -> MetricWriters:
    """Writers for a run in folder ``out`` that continues after ``resume_step`` (0: a fresh run).

    On resume, rows of later steps are dropped from ``metrics.jsonl``. A fresh run in a used folder
    keeps the old rows as ``metrics.previous.jsonl``. ``config_dict`` is shown with the run in
    TensorBoard and Weights & Biases.

    Raises `ConfigError` if ``logging.tensorboard`` or ``logging.wandb`` asks for a package that is
    not installed (before any file changes), and `MegakdaError` if ``metrics.jsonl`` is damaged.
    """
    if logging_cfg.tensorboard:
        _import_tensorboard()
    if logging_cfg.wandb:
        _import_wandb()
    out.mkdir(parents=True, exist_ok=True)
    path = out / METRICS_FILE
    if resume_step == 0 and path.exists() and path.stat().st_size:
        os.replace(path, out / PREVIOUS_METRICS_FILE)
    writers = MetricWriters([JsonlWriter(path, keep_until=resume_step)])
    try:
        if logging_cfg.tensorboard:
            writers.writers.append(
                TensorBoardWriter(out / TENSORBOARD_DIR, config_dict, resume_step)
            )
        if logging_cfg.wandb:
            writers.writers.append(WandbWriter(logging_cfg, out, config_dict, resume_step))
    except BaseException:
        writers.close()
        raise
    return writers
