"""The embedded default: a synthetic world of facts and the tiny language model pretrained on it, made once and cached.

`pretrain.py` does the same for any file of facts. Knows nothing of editing, probing or fine-tuning.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from retention.cache_folders import publish
from retention.types import content_id
from retention.world import phrases
from retention.world.generate import World, build, material
from retention.world.settings import RECIPE_VERSION, Recipe, WorldSettings

__all__ = ["WorldModel", "World", "Recipe", "build", "phrases"]


@lru_cache(maxsize=32)
def _world_id(settings: WorldSettings) -> str:
    made = material(settings)
    facts = [[f.subject, f.prompt, f.target, f.paraphrases, f.phrasings, f.exposures] for f in made.facts]
    return content_id([facts, sorted(made.warm), made.text, build(settings).vocabulary])


class WorldModel(WorldSettings):
    """A model that knows the facts of the embedded world with these settings."""

    name: Literal["world"] = "world"

    def key(self) -> str:
        """Content key of the pretrained folder: settings, world, recipe version, library versions, threads.

        Loads nothing; the world is generated, so that other phrasings or names are another model.
        """
        return content_id(
            {
                "settings": self.model_dump(),
                "world": _world_id(self),
                "recipe": RECIPE_VERSION,
                "versions": {
                    name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")
                },
                "threads": 1,
            }
        )

    def folder(self, cache: Path, progress: Callable[[int, int], None] | None = None) -> Path:
        """Folder of the pretrained model below `cache`, made on first use (a minute or two of one core).

        A stock Hugging Face folder with corpus.txt, facts.jsonl and world.json (see pretrain.py). It appears whole or
        not at all; of two processes that want it at once, one waits. `progress(done, total)`: steps.
        """
        from retention.world.pretrain import pretrain
        from retention.world.tokenizer import word_tokenizer

        def write(folder: Path) -> dict[str, Any]:
            tokenizer = word_tokenizer(build(self).vocabulary, 4 * self.context)
            pretrain(material(self), tokenizer, folder, self, settings=self.model_dump(), progress=progress)
            return {}

        return publish(self.place(cache), write)

    def place(self, cache: Path) -> Path:
        """Return where the folder is, or would be."""
        return Path(cache) / "worlds" / self.key()
