"""Which engine: what can be said of each, and what is refused before any work."""

from __future__ import annotations

import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from retention.engines import Engine, ray
from retention.types import UserError


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"name": "rai"}, "--engine: unknown engine 'rai'; did you mean 'ray'?"),
        ({"workers": 2}, "--workers: engine inline knows nothing of it; expected with --engine ray or slurm"),
        ({"gpus_per_run": 0.5}, "--gpus-per-run: engine inline knows nothing of it"),
        (
            {"name": "ray", "cluster": "local"},
            "--cluster: engine ray knows nothing of it; expected with --engine slurm",
        ),
        ({"name": "slurm", "address": "auto"}, "--address: engine slurm knows nothing of it"),
        ({"name": "ray", "workers": -1}, "--workers: expected 1 or more, got -1"),
        ({"name": "ray", "gpus_per_run": -0.5}, "--gpus-per-run: expected 0 or more, got -0.5"),
        ({"name": "slurm"}, "--cluster: expected one of slurm, local, got None"),
        ({"name": "slurm", "cluster": "slrum"}, "--cluster: expected one of slurm, local, got 'slrum'"),
    ],
)
def test_what_an_engine_does_not_know(said, told):
    with pytest.raises(UserError, match=re.escape(told)):
        Engine(**said)


def test_what_engines_take():
    assert Engine().name == "inline"
    assert Engine(name="ray", workers=4, gpus_per_run=0.5, address="auto").workers == 4
    assert Engine(name="slurm", cluster="local", job={"timeout_min": 10}).job["timeout_min"] == 10


def test_an_engine_that_is_not_installed_says_how_to_get_it(monkeypatch):
    from retention.engines import ray, slurm

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'retention\[ray\]'"):
        ray._library()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'retention\[slurm\]'"):
        slurm._executor(None, "local", 0.0, {})  # type: ignore[arg-type]


def test_workers_share_the_cores(monkeypatch):
    from retention.engines.ray import pool

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [pool(n, 1, 0.0) for n in (1, 4, 8, 20)] == [1, 4, 8, 8]
    assert [pool(n, 3, 0.0) for n in (1, 4)] == [1, 2]
    assert pool(4, 16, 0.0) == 1
    assert pool(20, 4, 0.25) == 20  # on a GPU the cores mostly wait


def test_ray_starts_a_cluster_of_its_own_beside_another_studys(monkeypatch):
    """Left to itself, Ray joins whatever cluster runs on the machine, and then refuses the number of CPUs."""
    asked: list[tuple[Any, Any]] = []
    fake = SimpleNamespace(
        is_initialized=lambda: False, init=lambda *a, **k: asked.append((a, k)), shutdown=lambda: None
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray._running(fake, 2, 3, None):
        pass
    with ray._running(fake, 2, 3, "head:6379"):
        pass
    assert [a or k["address"] for a, k in asked] == [("local",), "head:6379"]
    assert [k.get("num_cpus") for _, k in asked] == [6, None]
