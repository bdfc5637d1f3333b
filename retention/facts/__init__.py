"""Fact sources: one file each, the union that the study schema is made of, and the way to a pool."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from retention.facts.chronoedit import ChronoEdit
from retention.facts.counterfact import CounterFact
from retention.facts.jsonl import JsonLines
from retention.facts.knowedit import KnowEdit
from retention.facts.mquake import MQuAKE
from retention.facts.popqa import PopQA
from retention.facts.qaedit import QAEdit
from retention.facts.s2rke import S2RKE
from retention.facts.trex import TRex
from retention.facts.verbalised import Verbalised
from retention.facts.wikibigedit import WikiBigEdit
from retention.facts.world import WorldFacts
from retention.facts.zsre import ZsRE
from retention.types import FactPool, Part, UserError
from retention.world import WorldModel

AnyFacts = Annotated[
    WorldFacts | CounterFact | ZsRE | MQuAKE | KnowEdit | WikiBigEdit | QAEdit | S2RKE | ChronoEdit | PopQA | TRex
    | Verbalised | JsonLines,
    Field(discriminator="name"),
]  # fmt: skip

__all__ = ["AnyFacts", "pool_of"]


def pool_of(facts: AnyFacts, model: Part, seed: int) -> FactPool:
    """What a source offers for a seed. The world's facts are those of the world that the model was pretrained on."""
    from retention.world.facts_model import FactModel  # which reads phrasings from a file of this folder

    if isinstance(facts, WorldFacts):
        if not isinstance(model, WorldModel):
            raise UserError(
                "facts: world: these are the facts of `model: {name: world}`; for another model name another source"
            )
        return facts.pool(model, seed)
    if isinstance(facts, Verbalised) and isinstance(model, FactModel) and facts.source != model.source:
        raise UserError("facts: verbalised: `source` differs from the model's; the model knows the facts of its own")
    return facts.pool(seed)
