"""lm_eval's tasks on a megakda model, with errors that say what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakda.errors import ConfigError, DataError, RuntimeMismatch
from megakda.evaluation import output

if TYPE_CHECKING:
    from megakda.evaluation.lm_eval_model import MegakdaLM


@dataclass(frozen=True)
class Prompting:
    """How questions are put to a model; the names are lm_eval's.

    Attributes:
        apply_chat_template: as conversations, written out by the model's chat template.
        system_instruction: what stands before everything else.
        fewshot_as_multiturn: examples are messages of their own, and not one with the question;
            None for what lm_eval does, which is messages of their own in conversations.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ConfigError(
                "--fewshot-as-multiturn makes messages of a conversation: give "
                "--apply-chat-template too"
            )

    @property
    def multiturn(self) -> bool:
        """`fewshot_as_multiturn` with its default."""
        if self.fewshot_as_multiturn is None:
            return self.apply_chat_template
        return self.fewshot_as_multiturn


@dataclass(frozen=True)
class Tasks:
    """Tasks that have been found, with their data read.

    Attributes:
        names: as lm_eval knows them, and paths of yaml files.
        manager: lm_eval's, which has them loaded.
        limit: samples per task; below 1: a share of them.
        num_fewshot: examples before each question; None for what the task says.
        seed: of the choice of examples.
    """

    names: list[str]
    manager: Any
    limit: float | None
    num_fewshot: int | None
    seed: int


def find_tasks(
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    manager: Any = None,
) -> Tasks:
    """Finds tasks and reads their data, before a model is loaded.

    Args:
        tasks: names, groups or tags that lm_eval knows, patterns of them, or paths of yaml files.
        include_path: a folder with further yaml files.
        limit, num_fewshot, seed: see `Tasks`.
        manager: an lm_eval TaskManager that knows the tasks; None for one that finds them.

    Raises:
        ConfigError: an unknown task or a setting that cannot work.
        DataError: a task whose data cannot be read or downloaded.
        RuntimeMismatch: lm_eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeMismatch(
            f"lm_eval tasks need the lm_eval package ({error}): pip install 'megakda[eval]'"
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include-path={include_path!r} is no folder: name one with yaml files")
    if limit is not None and limit <= 0:
        raise ConfigError(f"limit={limit} must be above 0")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num-fewshot={num_fewshot} must be at least 0")
    if manager is None:
        # Reading all of lm_eval's own tasks takes seconds, and files do without.
        own = any(not _is_file(name) for name in tasks)
        manager = TaskManager(include_path=include_path, include_defaults=own)
    chosen = _known_tasks(manager, tasks)
    loaded = _load(manager, chosen)
    for name, task in loaded["tasks"].items():
        if num_fewshot and not (task.has_training_docs() or task.config.fewshot_split):
            raise ConfigError(
                f"num-fewshot={num_fewshot}: task {name} has no split to take examples from; give "
                "it a fewshot_split or training_split"
            )
    manager.load = lambda names: loaded  # simple_evaluate would read all data again
    return Tasks(chosen, manager, limit, num_fewshot, seed)


def run_tasks(model: MegakdaLM, tasks: Tasks, prompting: Prompting | None = None) -> dict[str, Any]:
    """Evaluates tasks. Collective where the model is.

    Returns:
        lm_eval's results, with per-sample rows under "samples" and, as in the files of lm_eval's
        own command line, the chat template and the other settings of `prompting`; on ranks other
        than the first of a machine {}.

    Raises:
        ConfigError: options that do not go together, or a model without a chat template.
    """
    from lm_eval.evaluator import simple_evaluate

    prompting = prompting or Prompting()
    prompting.check()
    template = model.chat_template(True) if prompting.apply_chat_template else None
    results = simple_evaluate(
        model,
        tasks=tasks.names,
        task_manager=tasks.manager,
        limit=tasks.limit,
        num_fewshot=tasks.num_fewshot,
        random_seed=tasks.seed,
        numpy_random_seed=tasks.seed,
        torch_random_seed=tasks.seed,
        fewshot_random_seed=tasks.seed,
        apply_chat_template=prompting.apply_chat_template,
        system_instruction=prompting.system_instruction,
        fewshot_as_multiturn=prompting.multiturn,
    )
    if not results:
        return {}
    return {
        **results,
        "chat_template": template,
        "system_instruction": prompting.system_instruction,
        "fewshot_as_multiturn": prompting.multiturn,
    }


def write_results(results: dict[str, Any], out: Path) -> None:
    """Writes what `run_tasks` returned: `out` without samples, and `samples_file(out)` with them.

    Raises:
        ConfigError: a file cannot be written.
    """
    from lm_eval.utils import handle_non_serializable

    samples = results.get("samples", {})
    rest = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(rest, indent=2, default=handle_non_serializable)
    lines = [
        json.dumps({"task": task, **row}, default=handle_non_serializable) + "\n"
        for task, rows in samples.items()
        for row in rows
    ]
    output.write_text(out, text + "\n")
    output.write_text(samples_file(out), "".join(lines))


def samples_file(out: Path) -> Path:
    """Where the samples go: res/a.samples.jsonl for res/a.json, and for res/a."""
    name = out.stem if out.suffix == ".json" else out.name  # kimi-1.3b has no suffix
    return out.with_name(f"{name}.samples.jsonl")


def table(results: dict[str, Any]) -> str:
    """lm_eval's own Markdown table of the scores."""
    from lm_eval.utils import make_table

    return make_table(results)


def _known_tasks(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Names and files, patterns resolved."""
    chosen: list[str] = []
    for name in tasks:
        if _is_file(name):
            if not Path(name).is_file():
                raise ConfigError(f"tasks={name!r}: there is no such file")
            chosen.append(name)
            continue
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ConfigError(
                f"tasks={name!r} is no task that lm_eval knows{hint}. `lm_eval ls tasks` lists "
                "them; your own go into yaml files, named here or found by --include-path"
            )
        chosen += [match for match in matches if match not in chosen]
    if not chosen:
        raise ConfigError("tasks=[]: name at least one task or yaml file")
    return chosen


def _is_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml")


def _load(manager: Any, tasks: list[str]) -> dict[str, Any]:
    """Reads the tasks' data before the model works on any, so that errors come first."""
    try:
        return manager.load(tasks)
    except Exception as error:  # datasets, huggingface_hub and yaml raise whatever they like
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"tasks={','.join(tasks)}: a task or its data cannot be read ({type(error).__name__}: "
            f"{lines[0]}). Data from the Hugging Face hub has to be reachable or in its cache "
            "(HF_HOME; HF_HUB_OFFLINE=1 uses the cache alone); local data is named by "
            "dataset_path: json and dataset_kwargs.data_files in the yaml file, relative to the "
            "current folder"
        ) from error
