"""zsRE (Levy et al. 2017) in the form of MEND (Mitchell et al. 2022): questions, answered by the object.

Keys: `subject`, `src` (question), `answers` (true objects; `pred`, an older model's guess, where they are absent),
`alt` (new object), `rephrase` (question), `loc` and `loc_ans` (an unrelated Natural Questions pair).

The prompt is the question's text and the answer follows it. The data name no relation, and several records often ask
for one fact in different words. A record whose `alt` is among the true answers corrects that older model and changes no
fact; it gives a fact, but no edit, and is counted. Locality questions name no subject: the subject is the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from retention.facts._read import different
from retention.facts._source import FileFacts, Gathered, locality
from retention.types import Fact, FactPool

PLACE = "zsre/zsre_3k.json"  # below $RETENTION_DATA
PREFIX = "nq question: "  # marks the locality questions; no part of the question


class ZsRE(FileFacts):
    """Facts and edits of zsRE."""

    lacks: ClassVar[Mapping[str, str]] = {
        "two_hop": "zsRE does not say what follows from its facts; world does, and jsonl with the key `two_hop`",
        "reversed": "zsRE has no question for the subject; world, trex and verbalised have phrasings that end in it, "
        "and jsonl with the key `reversed`",
    }

    name: Literal["zsre"] = "zsre"
    place: ClassVar[str] = PLACE
    what: ClassVar[str] = "zsRE file"

    def gather(self, seed: int) -> FactPool:
        """All records. The seed is not used."""
        found = Gathered(self.strict)
        for n, record in enumerate(self.records()):
            subject = record.text("subject")
            guess, new = record.optional_text("pred"), record.text("alt")
            answers = record.texts("answers") or ((guess,) if guess else (record.text("answers", "pred"),))
            if guess is not None:
                different(record, guess, new)
            prompt = found.phrasing(record, record.text("src"), subject, "question")
            if prompt is None:
                continue
            again = found.phrasing(record, record.optional_text("rephrase"), subject, "rephrasing")
            fact = Fact(
                id=f"zsre-{n}",
                subject=subject,
                relation=None,
                prompt=prompt,
                target=answers[0],
                paraphrases=() if again is None else (again,),
            )
            if new in answers:
                found.fact(fact)
                found.objects[fact.kind][new] = None
                found.dropped["edit: its new object is a true answer"] += 1
                continue
            question = record.optional_text("loc")
            near = () if question is None else (self._near(f"{fact.id}-near", question, record.text("loc_ans")),)
            found.edit(fact, new, near)
        return found.pool()

    @staticmethod
    def _near(id: str, question: str, answer: str) -> Fact:
        return locality(id, question.removeprefix(PREFIX), answer, "nq")
