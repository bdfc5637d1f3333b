"""When an edited language model is fine-tuned, what does it forget?"""

from typing import Any

__all__ = ["Study", "run", "load"]


def __getattr__(name: str) -> Any:
    """The public API, imported on first use: `retention status` need not wait for torch."""
    if name == "Study":
        from retention.study import Study

        return Study
    if name == "run":
        from retention.api import run

        return run
    if name == "load":
        from retention.reading import load

        return load
    raise AttributeError(f"module 'retention' has no attribute {name!r}")
