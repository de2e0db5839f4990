"""Composition of recipes and overrides into a typed `Config`, with errors a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megakda.config.scale import scaled
from megakda.config.schema import Config
from megakda.config.suggest import suggest
from megakda.errors import ConfigError

ConfigStore.instance().store(name="schema", node=Config)


def recipes_dir() -> Path:
    """The recipe tree: inside the package where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"no recipes/config.yaml inside or beside {package}: the installation is incomplete; "
        "reinstall megakda"
    )


def compose(overrides: Sequence[str] = ()) -> Config:
    """The recipe tree's `config.yaml` with `overrides` (Hydra's syntax), names and types checked.

    Raises:
        ConfigError: an unknown key, recipe or value, or an override that cannot be parsed.
    """
    GlobalHydra.instance().clear()
    try:
        _check_stage_numbers(overrides)
        return from_tree(_tree([_with_new_keys(override) for override in overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None
    except AssertionError:  # OmegaConf's own, for an override that goes into a null
        inside = _inside_of_settings(overrides)
        if not inside:
            raise
        raise ConfigError(
            f"{', '.join(inside)}: a part of a setting can be overridden only if a recipe gives "
            "the whole, and here it is null; set the whole instead, as "
            "'schedule.stages=[{kind: cosine, steps: 10, to: 1e-4}]'"
        ) from None


def _tree(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(recipes_dir()), version_base="1.3"):
        return hydra_compose("config", overrides=overrides)


def _with_new_keys(override: str) -> str:
    """The override of a part of a stage as Hydra's `++`, for keys that the recipe leaves out.

    What a stage knows no key for is refused where stages are read.
    """
    return f"++{override}" if override.startswith(_STAGES) else override


_STAGES = "schedule.stages."


def _check_stage_numbers(overrides: Sequence[str]) -> None:
    """Overrides of parts of stages are of stages that there are."""
    parts = [o for o in overrides if o.lstrip("+~").startswith(_STAGES)]
    stages = _tree([o for o in overrides if o not in parts]).schedule.stages if parts else None
    if stages is None:
        return
    for part in parts:
        number = re.split(r"[.=]", part.lstrip("+~").removeprefix(_STAGES))[0]
        if number not in map(str, range(len(stages))):
            raise ConfigError(
                f"{part}: the recipe has {len(stages)} stages, schedule.stages.0 to "
                f"schedule.stages.{len(stages) - 1}; to have others set the whole list"
            )


def from_tree(tree: DictConfig) -> Config:
    """The typed config of a composed tree, interpolations resolved, divided down by `scale`."""
    OmegaConf.resolve(tree)
    known = list(_keys(Config()))
    for key in _tree_keys(OmegaConf.to_container(tree)):
        if key not in known:  # `+key=value` gets past Hydra's own check
            raise ConfigError(_no_such_setting(key, known))
    config = OmegaConf.to_object(tree)
    if not isinstance(config, Config):
        raise ConfigError("recipes/config.yaml must begin its defaults with `- schema`")
    return scaled(config)


def to_yaml(config: Config) -> str:
    """The config as YAML that `compose` could have produced."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting below `node`, a dataclass instance."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _tree_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _tree_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _inside_of_settings(overrides: Sequence[str]) -> list[str]:
    """The overrides of a part of a setting, as of an entry of a list."""
    known = tuple(f"{key}." for key in _keys(Config()))
    return [override for override in overrides if override.lstrip("+~").startswith(known)]


def _no_such_setting(key: str, known: list[str]) -> str:
    groups = sorted(path.name for path in recipes_dir().iterdir() if path.is_dir())
    return f"{key}: no such setting{suggest(key, known + groups)}; recipes/README.md lists them all"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One paragraph: what was received, what the rule is, what to do."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"the override {error.override!r} cannot be parsed: write key=value, and quote values "
            "with spaces, commas or brackets for the shell"
        )
    if isinstance(error, MissingConfigException):
        return _explain_missing_recipe(error)
    key = _unknown_key(error, overrides)
    if key:
        return _no_such_setting(key, list(_keys(Config())))
    cause: BaseException | None = error
    while cause is not None:
        full_key = getattr(cause, "full_key", None)
        if full_key and isinstance(cause, MissingMandatoryValue):
            return f"{full_key} has no value: set it, or choose a recipe that does"
        if full_key:
            return f"{full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    return text.splitlines()[0]


def _explain_missing_recipe(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, _, name = str(wanted).rpartition("/")
    root = recipes_dir()
    top = group.split("/")[0] or str(wanted)
    available = sorted(
        str(path.relative_to(root / top).with_suffix("")) for path in (root / top).rglob("*.yaml")
    )
    asked = str(wanted).removeprefix(f"{top}/") if group else name
    if not available:
        groups = sorted(p.name for p in root.iterdir() if p.is_dir())
        return f"{wanted}: no such recipe group{suggest(top, groups)}; the groups are {groups}"
    return (
        f"{top}={asked}: no such recipe{suggest(asked, available)}; "
        f"recipes/{top} has {', '.join(available)}"
    )


def _unknown_key(error: Exception, overrides: Sequence[str]) -> str | None:
    match = re.search(r"Could not override '([^']+)'", str(error))
    if match and "is not in struct" in f"{error} {error.__cause__}":
        return match.group(1)
    if isinstance(error, ConfigCompositionException) or "not in" in str(error):
        match = re.search(r"Key '([^']+)' (?:is )?not in", f"{error} {error.__cause__ or ''}")
        full = re.search(r"full_key: (\S+)", f"{error} {error.__cause__ or ''}")
        if match:
            return full.group(1) if full else match.group(1)
        match = re.search(r"No match in the defaults list|Could not override '([^']+)'", str(error))
        if match and match.group(0).startswith("No match"):
            for override in overrides:
                if f"'{override.split('=')[0].lstrip('+~')}'" in str(error):
                    return override.split("=")[0]
    return None
