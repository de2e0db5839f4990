"""A cluster as its recipe describes it: rates from data sheets, and assumed shares of them.

`cluster=h200x1024` is recipes/cluster/h200.yaml with 1024 GPUs. The files are no group of the
recipe tree: a run does not depend on what somebody expects of a machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megakda.config import recipes_dir
from megakda.config.suggest import suggest
from megakda.errors import ConfigError


@dataclass(frozen=True)
class Efficiency:
    """Shares of a machine's rates that programs reach. Assumptions, until somebody measures them.

    Attributes:
        dense_gemm, grouped_gemm, attention, kda: of the FLOP/s, by matrix products, by those of
            experts, by fused attention and by KDA's kernels.
        memory: of the memory's rate, by everything else.
        nvlink, network: of the rates between GPUs, by collectives.
    """

    dense_gemm: float
    grouped_gemm: float
    attention: float
    kda: float
    memory: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class Cluster:
    """So many equal GPUs.

    Attributes:
        name, gpus: of `cluster=NAMExGPUS`.
        gpus_per_node: that NVLink connects.
        memory_gb: of a GPU, 1e9 bytes.
        memory_bandwidth_gbs: 1e9 bytes per second.
        peak_bf16_tflops: dense.
        nvlink_gbs, network_gbs: 1e9 bytes per second and GPU in each direction, inside a node and
            to others.
        efficiency: assumed.
        latency_us: of a collective call, without any bytes.
        launch_us: of one kernel on the host.
        memory_headroom: share of the memory that has to stay free.
        price_per_gpu_hour: in any currency, or None.
    """

    name: str
    gpus: int
    gpus_per_node: int
    memory_gb: float
    memory_bandwidth_gbs: float
    peak_bf16_tflops: float
    nvlink_gbs: float
    network_gbs: float
    efficiency: Efficiency
    latency_us: float
    launch_us: float
    memory_headroom: float
    price_per_gpu_hour: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of a GPU."""
        return int(self.memory_gb * 1e9)

    @property
    def usable(self) -> int:
        """Bytes of a GPU without the headroom."""
        return int(self.memory * (1 - self.memory_headroom))

    @property
    def peak(self) -> float:
        """FLOP/s of a GPU."""
        return self.peak_bf16_tflops * 1e12


_SPEC = re.compile(r"([A-Za-z][\w-]*?)x(\d+)")


def take_cluster(overrides: Sequence[str]) -> tuple[Cluster, list[str]]:
    """The cluster that `cluster=NAMExGPUS` asks for, and the overrides without it.

    Raises:
        ConfigError: no such override, or more than one, or one that `load_cluster` refuses.
    """
    given = [o for o in overrides if o.partition("=")[0] == "cluster"]
    if len(given) != 1:
        found = " ".join(given) or "no cluster"
        raise ConfigError(
            f"{found}: give exactly one cluster=NAMExGPUS, such as cluster=h200x1024; "
            f"recipes/cluster has {', '.join(_known())}"
        )
    return load_cluster(given[0].partition("=")[2]), [o for o in overrides if o not in given]


def load_cluster(spec: str) -> Cluster:
    """The cluster of a text such as h200x1024.

    Raises:
        ConfigError: an unknown name, a file with wrong numbers, or GPUs that fill no whole nodes.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"cluster={spec}: must be NAMExGPUS, a file of recipes/cluster and a number of GPUs, "
            f"such as cluster=h200x1024; there are {', '.join(_known())}"
        )
    name, gpus = match[1], int(match[2])
    if name not in _known():
        raise ConfigError(
            f"cluster={spec}: no such cluster{suggest(name, _known())}; recipes/cluster has "
            f"{', '.join(_known())}, and a new file there adds one"
        )
    cluster = _read(_folder() / f"{name}.yaml", name, gpus)
    whole = cluster.gpus_per_node
    if gpus < 1 or (gpus > whole and gpus % whole):
        down = max(1, gpus // whole) * whole
        raise ConfigError(
            f"cluster={spec}: {gpus} GPUs must be a part of one node or a multiple of the {whole} "
            f"GPUs of a node (gpus_per_node of recipes/cluster/{name}.yaml): use "
            f"cluster={name}x{down}"
        )
    return cluster


def _folder() -> Path:
    return recipes_dir() / "cluster"


def _known() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _read(path: Path, name: str, gpus: int) -> Cluster:
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    efficiency = _section(tree, Efficiency, path, "efficiency", ())
    values = _section(tree, Cluster, path, "", ("name", "gpus"), optional=("price_per_gpu_hour",))
    cluster = Cluster(
        **{**values, "name": name, "gpus": gpus, "efficiency": Efficiency(**efficiency)}
    )
    _check(cluster, path)
    return cluster


def _section(
    tree: Any, kind: Any, path: Path, key: str, given: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """The values of a dataclass, names checked."""
    section = tree.get(key) if key and isinstance(tree, dict) else tree
    names = [field.name for field in fields(kind) if field.name not in given]
    prefix = f"{key}." if key else ""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {key or 'the file'} must hold {', '.join(names)}")
    for name in section:
        if name not in names:
            raise ConfigError(f"{path}: {prefix}{name}: no such setting{suggest(str(name), names)}")
    missing = [name for name in names if name not in section and name not in optional]
    if missing:
        raise ConfigError(f"{path}: {prefix}{missing[0]} has no value: add it")
    return dict(section)


def _check(cluster: Cluster, path: Path) -> None:
    numbers = {
        field.name: getattr(cluster, field.name)
        for field in fields(cluster)
        if field.name not in ("name", "gpus", "efficiency")
    }
    if cluster.price_per_gpu_hour is None:
        del numbers["price_per_gpu_hour"]
    shares = {f"efficiency.{k}": v for k, v in vars(cluster.efficiency).items()}
    for key, value in {**numbers, **shares}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}: {key}={value!r}: must be a number")
        if not 0 <= value < float("inf") or (value == 0 and key not in _MAY_BE_ZERO):
            raise ConfigError(f"{path}: {key}={value}: must be a positive number")
        if (key in shares or key == "memory_headroom") and value > 1:
            raise ConfigError(f"{path}: {key}={value}: is a share of the whole, at most 1")
    if not isinstance(cluster.gpus_per_node, int):
        raise ConfigError(f"{path}: gpus_per_node={cluster.gpus_per_node}: must be whole")
    if cluster.memory_headroom >= 1:
        raise ConfigError(f"{path}: memory_headroom={cluster.memory_headroom}: leaves nothing")


_MAY_BE_ZERO = ("latency_us", "launch_us", "memory_headroom", "price_per_gpu_hour")
