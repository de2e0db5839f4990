"""Clusters: what their files say, and what cannot be one."""

from __future__ import annotations

import pytest

from megakda.config import recipes_dir
from megakda.errors import ConfigError
from megakda.models.flops import peak_flops
from megakda.plan import cluster as clusters
from megakda.plan.cluster import load_cluster, take_cluster


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_shipped_clusters_load_and_say_where_their_rates_are_from(name):
    found = load_cluster(f"{name}x16")
    assert (found.name, found.gpus, found.gpus_per_node) == (name, 16, 8)
    assert found.peak == peak_flops(f"NVIDIA {name.upper()}")  # one figure in the whole repository
    text = (recipes_dir() / "cluster" / f"{name}.yaml").read_text()
    for line in text.splitlines():
        if line.partition(":")[0] in ("memory_gb", "peak_bf16_tflops", "nvlink_gbs", "network_gbs"):
            assert "data sheet" in line or "same" in line, line
    assert "assumptions, no measurements" in text


def test_the_override_is_taken_out_of_the_others():
    found, rest = take_cluster(["model=tiny", "cluster=h200x8", "precision=bf16"])
    assert found.gpus == 8 and rest == ["model=tiny", "precision=bf16"]


REFUSED = {
    "unknown": ("h20x8", ["cluster=h20x8", "did you mean h200", "b200, h100, h200"]),
    "no number": ("h200", ["cluster=h200", "NAMExGPUS", "cluster=h200x1024"]),
    "no GPU": ("h200x0", ["cluster=h200x0", "cluster=h200x8"]),
    "half a node more": ("h200x12", ["12 GPUs", "multiple of the 8", "cluster=h200x8"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_clusters_name_the_value_the_rule_and_the_remedy(case):
    spec, expected = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_cluster(spec)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize("given", [[], ["cluster=h200x8", "cluster=h100x8"]])
def test_exactly_one_cluster_is_asked_for(given):
    with pytest.raises(ConfigError, match="exactly one cluster=NAMExGPUS"):
        take_cluster(["model=tiny", *given])


# case: line to replace, its replacement, what the message must say
NONSENSE = {
    "negative": ("network_gbs: 50", "network_gbs: -50", "network_gbs=-50: must be a positive"),
    "zero": ("gpus_per_node: 8", "gpus_per_node: 0", "gpus_per_node=0: must be a positive"),
    "text": ("memory_gb: 141", "memory_gb: much", "memory_gb='much': must be a number"),
    "more than all": ("  kda: 0.3", "  kda: 3", "efficiency.kda=3: is a share of the whole"),
    "nothing left": ("memory_headroom: 0.1", "memory_headroom: 1", "leaves nothing"),
    "unknown setting": ("latency_us: 20", "latencyus: 20", "did you mean latency_us"),
    "missing": ("launch_us: 5", "# launch_us: 5", "launch_us has no value"),
    "half a GPU": ("gpus_per_node: 8", "gpus_per_node: 7.5", "must be whole"),
    "no YAML": ("gpus_per_node: 8", "gpus_per_node: [8", "cannot be read"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_in_a_file_is_refused(case, tmp_path, monkeypatch):
    before, after, expected = NONSENSE[case]
    text = (recipes_dir() / "cluster" / "h200.yaml").read_text()
    assert before in text
    (tmp_path / "mine.yaml").write_text(text.replace(before, after))
    monkeypatch.setattr(clusters, "_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="mine.yaml") as caught:
        load_cluster("minex8")
    assert expected in str(caught.value)


def test_anybody_can_add_a_file(tmp_path, monkeypatch):
    text = (recipes_dir() / "cluster" / "h200.yaml").read_text()
    priced = text.replace("price_per_gpu_hour: null", "price_per_gpu_hour: 2.5")
    (tmp_path / "mine.yaml").write_text(priced)
    monkeypatch.setattr(clusters, "_folder", lambda: tmp_path)
    found = load_cluster("minex4")  # a part of a node
    assert (found.gpus, found.price_per_gpu_hour) == (4, 2.5)
