"""A fine-tune on several processes: the stage is started anew by `accelerate launch`, once for each of them.

Rank 0 reads and publishes; what the others would publish is thrown away. Edits and base readings are made beforehand,
by one process. Run as a module it is one rank: `accelerate launch ... -m retention.launch JOB`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from retention import ranks
from retention.explain import nearest
from retention.store import Kind, Store
from retention.types import UserError

if TYPE_CHECKING:
    from retention.stages import Bench
    from retention.study import Run

# Of accelerate's distributed types those that one machine's launcher starts.
KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")
# Settings of accelerate that move no number: where processes meet, which devices they get, what is printed. How many
# there are, and in which precision they compute, is given on the command line.
IDLE = frozenset(
    {
        *("main_process_ip", "main_process_port", "machine_rank", "num_machines", "same_network", "rdzv_backend"),
        *("rdzv_conf", "gpu_ids", "compute_environment", "main_training_function", "debug", "quiet"),
        *("num_processes", "mixed_precision", "downcast_bf16", "enable_cpu_affinity", "monitor_interval"),
        *("log_dir", "tee", "role", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "tpu_name", "tpu_zone"),
    }
)
TAIL = 3000  # characters of what the processes printed that are told if they fail


class Launch(BaseModel):
    """How many processes train, and how they share the work. A step then takes `processes` times as many rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerate_config: str = Field(
        description="a configuration that ships with trl (fsdp2, multi_gpu, zero3 ...), or a YAML file of accelerate's"
    )
    processes: int | None = Field(None, ge=1, description="left out: as many as the configuration says")

    @model_validator(mode="after")
    def _there(self) -> Launch:
        kind = self.document.get("distributed_type")
        if not isinstance(kind, str):
            raise ValueError(
                f"{self.file}: is no configuration of accelerate (it says no distributed_type); `accelerate config` "
                "asks for one and writes it"
            )
        if kind not in KINDS:
            more = "; on processors: MULTI_GPU with use_cpu: true" if kind == "MULTI_CPU" else ""
            raise ValueError(
                f"{self.file}: distributed_type: expected one of {', '.join(KINDS)}, got {kind}, for which accelerate "
                f"starts one process here{more}"
            )
        if self.document.get("num_machines", 1) != 1:
            raise ValueError(
                f"{self.file}: num_machines: one machine is supported, got {self.document['num_machines']}"
            )
        if not isinstance(self.document.get("num_processes", self.processes), int):
            raise ValueError(f"{self.file}: says no num_processes: give `processes`")
        return self

    @cached_property
    def file(self) -> Path:
        shipped = {path.stem: path for path in _shipped()}
        own = Path(self.accelerate_config).expanduser()
        found = shipped.get(self.accelerate_config, own)
        if not found.is_file():
            hint = nearest(self.accelerate_config, shipped)
            raise ValueError(f"accelerate_config: neither a file nor a configuration of trl: {str(own)!r}{hint}")
        return found

    @cached_property
    def document(self) -> dict[str, Any]:
        try:
            found = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.file}: not YAML: {' '.join(str(error).split())}") from None
        return found if isinstance(found, dict) else {}

    @property
    def count(self) -> int:
        return self.processes or int(self.document["num_processes"])

    @property
    def shards(self) -> int:
        """Processes that share weights, gradients and optimizer states among them."""
        return self.count if self.document["distributed_type"] in ("FSDP", "DEEPSPEED") else 1

    def key(self) -> list[Any]:
        """What of it can move a number: how many processes, and what the file says of how they share the work."""
        kept = {k: v for k, v in self.document.items() if k not in IDLE}
        deepspeed = kept.get("deepspeed_config")
        if isinstance(deepspeed, dict) and (name := deepspeed.get("deepspeed_config_file")):
            own = Path(name).expanduser()
            content = hashlib.sha256(own.read_bytes()).hexdigest() if own.is_file() else name
            kept["deepspeed_config"] = deepspeed | {"deepspeed_config_file": content}
        return [self.count, kept]


def _shipped() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    assert spec is not None, "a dependency"
    assert spec.origin is not None
    return sorted((Path(spec.origin).parent / "accelerate_configs").glob("*.yaml"))


def launched() -> bool:
    """Whether this process is one that `start` has started."""
    return "RETENTION_RANK" in os.environ


def start(run: Run, bench: Bench) -> None:
    """Run the stage on several processes, and wait. Raises what rank 0 raised; a process that dies ends them all."""
    launch = run.settings.launch
    assert launch is not None, "asked for"
    with tempfile.TemporaryDirectory(prefix="retention-launch-") as folder:
        job, failed, log = (Path(folder) / name for name in ("job.pickle", "failed.json", "log.txt"))
        job.write_bytes(pickle.dumps((run, bench.store.root.absolute(), bench.cache.absolute(), failed)))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch.file)]
        command += ["--num_processes", str(launch.count), "--mixed_precision", "no"]  # tune.trainer.bf16 decides
        bench.report(f"starting {launch.count} processes: {run.label}", 0, 1)
        environment = os.environ | {"RETENTION_RANK": "1", "OMP_NUM_THREADS": str(run.settings.threads)}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "-m", "retention.launch", str(job)],
                stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            told = json.loads(failed.read_text()) if failed.is_file() else {}
            if "mistake" in told:
                raise UserError(told["mistake"])
            tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
            raise RuntimeError(told.get("traceback") or f"accelerate launch ended with code {code}\n{tail}")


class Onlooker(Store):
    """The results folder as other ranks than the first see it: what they would publish is thrown away."""

    @contextlib.contextmanager
    def publishing(self, kind: Kind, key: str, *, resume: bool = False) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="retention-rank-") as folder:
            yield Path(folder)


def main(path: str) -> None:
    """One rank."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else all ranks but the first would load empty weights
    import torch

    from retention.fine_tuning import tune
    from retention.stages import Bench

    run, results, cache, failed = pickle.loads(Path(path).read_bytes())  # written by `start`, for this process alone
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = Store(results) if ranks.rank() == 0 else Onlooker(results)
    try:
        if ranks.size() != (count := run.settings.launch.count):
            raise RuntimeError(f"accelerate started {ranks.size()} processes, not {count}")
        tune(run, Bench(store=store, cache=cache))
    except Exception as error:
        told = {"mistake": str(error)} if isinstance(error, UserError) else {"traceback": traceback.format_exc()}
        part = failed.with_suffix(f".{ranks.rank()}")
        part.write_text(json.dumps(told))
        part.replace(failed)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main(sys.argv[1])
