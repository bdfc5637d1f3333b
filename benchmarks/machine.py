"""What a measured ratio depends on besides the code: processor, precisions, versions; and the models by name."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from retention import half
from retention.fetch import MODELS, fetched
from retention.types import Missing

TOY = "toy"
CPUINFO = Path("/proc/cpuinfo")


def about() -> dict[str, Any]:
    """The processor, the widest vectors that torch uses on it, whether it has bfloat16 products, threads, versions."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": half.on_processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def models(asked: list[str] | None) -> dict[str, Path | None]:
    """Folders by name; None for the toy. Unless asked for others: SmolLM2, if it was fetched, and the toy."""
    found: dict[str, Path | None] = {}
    for name in asked or ["smollm2", TOY]:
        try:
            found[name] = None if name == TOY else fetched(name) if name in MODELS else Path(name)
        except Missing as error:
            if asked:
                raise SystemExit(str(error)) from None
    return found
