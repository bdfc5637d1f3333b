"""A tiny language model pretrained on real facts (CounterFact, T-REx, ParaRel phrasings), made once and cached.

The facts come from facts/verbalised.py and the pretraining from pretrain.py. Knows nothing of editing or probing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from retention.cache_folders import publish
from retention.facts.verbalised import VERSION, Source, leads, verbalise
from retention.facts.zsre import ZsRE
from retention.types import Fact, UserError, content_id
from retention.world.settings import RECIPE_VERSION, Recipe

END = "."


class FactModel(Recipe):
    """A model that knows the real facts of `source`; `facts: {name: verbalised}` draws from the same."""

    name: Literal["facts"] = "facts"
    source: Source = Source()
    vocabulary: PositiveInt = Field(8000, description="tokens of the byte-level BPE, at most")
    filler: bool = Field(True, description="also show the unrelated sentences of the other records' rephrasings")
    zsre: NonNegativeInt = Field(
        0, description="facts of zsRE that are stated besides, a question and its answer; for `facts: {name: zsre}`"
    )
    exposures: PositiveInt = 32  # statements of each fact in the main part of pretraining
    warm_exposures: PositiveInt = 60  # and of each fact of the first part

    @model_serializer(mode="wrap")
    def _without_idle(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `zsre` where it is 0: it is younger than stored results, whose keys stay."""
        return {k: v for k, v in dump(self).items() if k != "zsre" or v}

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [*self.source.files(), *(ZsRE().files() if self.zsre else [])]

    def key(self) -> str:
        """Content key of the pretrained folder: settings, data files, recipe version, library versions, threads."""
        settings = self.model_dump()
        libraries = ("torch", "transformers", "tokenizers")
        settings["source"] |= {"counterfact": None, "trex": None}  # what the files hold counts, not where they lie
        return content_id(
            {
                "settings": settings,
                "data": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files()],
                "facts": VERSION,
                "recipe": RECIPE_VERSION,
                "versions": {name: importlib.metadata.version(name) for name in libraries},
                "threads": 1,
            }
        )

    def folder(self, cache: Path, progress: Callable[[int, int], None] | None = None) -> Path:
        """Folder of the pretrained model below `cache`, made on first use (some minutes of one core).

        As WorldModel.folder: a stock Hugging Face folder with corpus.txt, facts.jsonl and world.json, whole or not at
        all. Raises UserError that says what is missing where the data are absent.
        """
        from retention.world.pretrain import pretrain
        from retention.world.stream import Material, warm_facts, wordings
        from retention.world.tokenizer import bpe_tokenizer

        def write(folder: Path) -> dict[str, Any]:
            facts = (*verbalise(self.source).facts, *self._questions())
            warm = warm_facts(facts, self)
            facts = tuple(replace(f, exposures=self.exposures + self.warm_exposures * (f.id in warm)) for f in facts)
            text = tuple(leads(self.source, facts)) if self.filler else ()
            # New objects are objects of some fact, so the tokenizer meets every word that a target has.
            stated = [sentence for fact in facts for sentence in wordings(fact, END)]
            tokenizer = bpe_tokenizer([*stated, *text], self.vocabulary, 4 * self.context)
            material = Material(facts=facts, warm=warm, text=text, end=END)
            pretrain(material, tokenizer, folder, self, settings=self.model_dump(), progress=progress)
            return {}

        return publish(self.place(cache), write)

    def place(self, cache: Path) -> Path:
        """Return where the folder is, or would be."""
        return Path(cache) / "facts" / self.key()

    def _questions(self) -> list[Fact]:
        """The facts of zsRE that are stated, drawn by the source's seed. Raises UserError where it has too few."""
        if not self.zsre:
            return []
        found = ZsRE().pool(0).facts
        if len(found) < self.zsre:
            raise UserError(f"model: zsre: {self.zsre} facts were asked for; the file has {len(found)}")
        drawn = random.Random(f"zsre {self.source.seed}").sample(found, self.zsre)
        return [replace(fact, tags=fact.tags | {"zsre"}) for fact in drawn]
