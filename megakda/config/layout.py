"""Where the layers of a model go in a pipeline."""

from __future__ import annotations

import math
from itertools import accumulate

from megakda.config.schema import ModelConfig, ParallelConfig
from megakda.errors import ConfigError


def chunk_layers(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each of the PP x VPP chunks, in model order.

    Chunk i is virtual stage i // PP of pipeline rank i % PP.

    Raises:
        ConfigError: the layers cannot be placed.
    """
    chunks = parallel.pipeline * parallel.virtual_pipeline
    layers = parallel.pipeline_layers
    if layers is not None:
        example = balanced_layers(model, chunks)
        if len(layers) != chunks or sum(layers) != model.num_layers or min(layers) < 1:
            raise ConfigError(
                f"parallel.pipeline_layers={list(layers)}: needs one positive entry for each of "
                f"the parallel.pipeline x parallel.virtual_pipeline = {chunks} chunks, adding up "
                f"to model.num_layers={model.num_layers}; for example {example}"
            )
        return list(layers)
    if model.num_layers % chunks:
        if model.num_layers < chunks:
            remedy = "use fewer pipeline stages"
        else:
            layers_csv = ",".join(map(str, balanced_layers(model, chunks)))
            remedy = f"set parallel.pipeline_layers=[{layers_csv}]"
        raise ConfigError(
            f"model.num_layers={model.num_layers} cannot be shared equally by parallel.pipeline="
            f"{parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline} = "
            f"{chunks} chunks: {remedy}"
        )
    return [model.num_layers // chunks] * chunks


def chunk_layers_of_rank(
    model: ModelConfig, parallel: ParallelConfig, pipeline_rank: int
) -> list[tuple[int, int]]:
    """(first, last + 1) layer, 0-based, of each virtual stage of `pipeline_rank`."""
    ends = list(accumulate(chunk_layers(model, parallel)))
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    return ranges[pipeline_rank :: parallel.pipeline]


def balanced_layers(model: ModelConfig, chunks: int) -> list[int]:
    """Layers of each chunk, as equal as can be."""
    share, rest = divmod(model.num_layers, chunks)
    # The first and last chunks also hold the embedding and the loss: they get no extra layer
    # while others can take it.
    layers = [share] * chunks
    inner = list(range(1, chunks - 1)) + [0, chunks - 1]
    for i in inner[:rest]:
        layers[i] += 1
    return layers


def least_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that a layout fits."""
    p = parallel
    return math.lcm(p.tensor * p.context, p.expert * p.expert_tensor) * p.pipeline
