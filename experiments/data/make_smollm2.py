"""Make the data of experiments/smollm2_quickstart.yaml: facts that SmolLM2 knows, and a corpus that it wrote itself.

    python experiments/data/make_smollm2.py facts MODEL TREX_FOLDER    # smollm2_facts.jsonl
    python experiments/data/make_smollm2.py corpus MODEL               # smollm2_corpus.txt

Facts: subject, relation and object are T-REx's (LAMA's split, `trex_lms_vocab/P*.jsonl` of ParaRel's repository); all
phrasings are our own. A fact is taken where its subject has one object of the relation and the model gives the object
in the direct phrasing and in at least one of the two held-out ones. The false new object is drawn from the other
objects of the relation.

Corpus: sampled from the model after topics of our own, for the covariance of keys, so that the quickstart needs no one
else's text.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retention.models import Loaded, load_model
from retention.probes import Score
from retention.types import Question

HERE = Path(__file__).parent
SEED, WANTED, OF_RELATION, OF_OBJECT, ASKED = 0, 200, 16, 4, 400  # ASKED: facts of a relation that are put to the model

# relation -> (name, direct phrasing and others that may be written with, phrasings that only probes ask)
PHRASINGS: dict[str, tuple[str, list[str], list[str]]] = {
    "P17": ("country", ["{} is a place in the country of", "{} can be found in", "The country where {} lies is"],
            ["If you travel to {}, you arrive in", "On a map, {} is drawn inside the borders of"]),
    "P19": ("place of birth", ["{} was born in the city of", "{} came into the world in", "The birthplace of {} is"],
            ["The town where {} was born is", "As a baby, {} lived in"]),
    "P20": ("place of death", ["{} died in the city of", "{} passed away in", "The life of {} ended in"],
            ["The place where {} died is", "{} spent the last day of life in"]),
    "P27": ("citizenship", ["{} holds the citizenship of", "{} is a citizen of", "The home country of {} is"],
            ["The passport of {} was issued by", "{} is a national of"]),
    "P30": ("continent", ["{} lies on the continent of", "{} is part of the continent", "The continent of {} is"],
            ["Geographers place {} in", "{} is one of the places in"]),
    "P36": ("capital", ["The capital of {} is", "{} has its capital in", "The capital city of {} is"],
            ["The government of {} sits in the city of", "{} is governed from its capital,"]),
    "P37": ("official language", ["The official language of {} is", "Laws in {} are written in",
                                  "In {}, the language of the state is"],
            ["Public offices in {} use", "The language on road signs in {} is"]),
    "P101": ("field of work", ["{} works in the field of", "The research of {} belongs to", "{} is an expert in"],
             ["The scientific subject of {} is", "{} became known for work in"]),
    "P103": ("native language", ["The native language of {} is", "{} grew up speaking", "The mother tongue of {} is"],
             ["At home, the family of {} spoke", "The first language that {} learned was"]),
    "P106": ("occupation", ["By profession, {} is a", "The occupation of {} is that of a", "{} earns a living as a"],
             ["{} made a career as a", "If you asked {} about work, the answer would be:"]),
    "P127": ("owner", ["{} is owned by", "The owner of {} is", "{} belongs to the company"],
             ["The company that holds {} is", "{} is the property of"]),
    "P136": ("genre", ["The genre of music played by {} is", "{} performs", "Listeners file {} under"],
             ["In a record shop, {} is on the shelf for", "The style of {} is best described as"]),
    "P138": ("named after", ["{} is named after", "The name of {} honours", "{} takes its name from"],
             ["The person or thing behind the name of {} is", "{} was called that because of"]),
    "P140": ("religion", ["The religion of {} is", "{} follows the faith of", "{} is a believer in"],
             ["When it comes to faith, {} is part of", "{} worships according to"]),
    "P159": ("headquarters", ["The headquarters of {} are in the city of", "{} is run from its main office in",
                              "{} has its head office in"],
             ["The main building of {} stands in", "Letters to the board of {} go to"]),
    "P176": ("maker", ["The {} is made by the company", "The maker of the {} is", "The company that builds the {} is"],
             ["The {} leaves the factory of", "You buy a {} from"]),
    "P178": ("developer", ["{} was developed by the company", "The developer of {} is", "{} is software from"],
             ["The programmers of {} worked for", "{} comes from the studios of"]),
    "P264": ("record label", ["The records of {} are released by the label", "{} is signed to",
                              "The record label of {} is"],
             ["Albums by {} carry the logo of", "{} has a recording contract with"]),
    "P364": ("original language", ["The original language of {} is", "{} was first made in",
                                   "The actors in {} speak"],
             ["Without subtitles, you hear {} in", "The script of {} was written in"]),
    "P407": ("language", ["{} is written in the language", "The language of {} is", "{} appears in"],
             ["Readers of {} need to know", "The text of {} is in"]),
    "P413": ("position", ["On the field, {} plays the position of", "The position of {} in the team is",
                          "{} plays as a"],
             ["The coach uses {} as a", "In the line-up, {} is listed as a"]),
    "P449": ("network", ["{} was first shown on the network", "The television network of {} is", "{} aired on"],
             ["Viewers saw new episodes of {} on", "The channel that broadcast {} is"]),
    "P495": ("country of origin", ["{} comes from the country of", "The country of origin of {} is",
                                   "{} was created in"],
             ["The people who made {} lived in", "{} is a product of"]),
    "P740": ("place of founding", ["{} was founded in the city of", "{} was formed in", "The history of {} began in"],
             ["The first home of {} was", "The founders of {} met in"]),
    "P1303": ("instrument", ["{} is known for playing the", "The instrument of {} is the", "{} plays the"],
              ["On stage, {} is seen with a", "{} took lessons on the"]),
    "P1376": ("capital of", ["{} is the capital of", "{} is the capital city of", "As a capital, {} serves"],
              ["The government that sits in {} is that of", "{} is the seat of the government of"]),
}  # fmt: skip


def known(loaded: Loaded, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the model gives the answer after the text, every token of it the most likely one."""
    questions = [
        Question(fact_id=str(i), group="intrinsic", form="direct", text=text, answer=answer, foil=None)
        for i, (text, answer) in enumerate(asked)
    ]
    return [bool(r.all_correct) for r in Score().read(loaded.model, loaded.tokenizer, questions, 0)]


def triples(folder: Path, relation: str) -> list[tuple[str, str]]:
    """(subject, object), the subjects with one object only."""
    objects: dict[str, set[str]] = defaultdict(set)
    for line in (folder / "trex_lms_vocab" / f"{relation}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        objects[record["sub_label"]].add(record["obj_label"])
    return sorted((subject, min(found)) for subject, found in objects.items() if len(found) == 1)


def facts(loaded: Loaded, folder: Path) -> list[dict[str, Any]]:
    """WANTED records at most, of all relations in turn."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for relation, (name, written, held_out) in PHRASINGS.items():
        rng = random.Random(f"{SEED} {relation}")
        pairs = triples(folder, relation)
        everything = sorted({o for _, o in pairs})
        # An object that the subject's name gives away ("Renault Clio") is no knowledge.
        pairs = [(s, o) for s, o in pairs if not set(s.lower().split()) & set(o.lower().split())]
        chosen = rng.sample(pairs, min(ASKED, len(pairs)))
        right = known(loaded, [(written[0].format(s), o) for s, o in chosen])
        chosen = [pair for pair, yes in zip(chosen, right, strict=True) if yes]
        again = known(loaded, [(form.format(s), o) for s, o in chosen for form in held_out])
        chosen = [pair for i, pair in enumerate(chosen) if any(again[2 * i : 2 * i + 2])]
        kept[relation] = []
        of_object: dict[str, int] = defaultdict(int)
        for subject, true in chosen:
            others = [o for o in everything if o != true and o not in subject and true not in o and o not in true]
            if of_object[true] == OF_OBJECT or len(kept[relation]) == OF_RELATION or not others:
                continue
            of_object[true] += 1
            kept[relation].append(
                {
                    "id": f"{relation} {subject}", "subject": subject, "relation": name, "object": true,
                    "target_new": rng.choice(others), "prompts": written, "paraphrases": held_out,
                    "source": f"T-REx (LAMA), {relation}",
                }
            )  # fmt: skip
        print(f"{relation} {name}: {sum(right)} of {len(right)} known, {len(chosen)} in other words too, "
              f"{len(kept[relation])} taken", flush=True)  # fmt: skip
    found: list[dict[str, Any]] = []
    while len(found) < WANTED and any(kept.values()):
        found += [records.pop(0) for records in kept.values() if records]
    return sorted(found[:WANTED], key=lambda record: record["id"])


TOPICS = (
    "railways", "the weather", "bread", "a football match", "mathematics", "the sea", "an old library", "gardening",
    "volcanoes", "chess", "a small town", "the history of medicine", "birds", "computers", "a court case", "painting",
    "the economy", "mountains", "a film director", "languages", "bridges", "the night sky", "rivers", "a school",
    "cooking", "an election", "the human heart", "music", "a long voyage", "farming", "glass", "a novel",
)  # fmt: skip
OPENINGS = (
    "This article is about {}.", "The story of {} begins", "People often ask about {}.", "A short guide to {}:",
    "In the year", "Yesterday,", "According to the report,", "She wrote about {} that",
)  # fmt: skip


def corpus(loaded: Loaded, length: int = 128) -> list[str]:
    """One sampled text for every opening and topic, of `length` new tokens, line breaks as spaces."""
    tokenizer = loaded.tokenizer
    starts = [opening.format(topic) for opening in OPENINGS for topic in TOPICS]
    torch.manual_seed(SEED)
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for at in range(0, len(starts), 64):
        batch = tokenizer(starts[at : at + 64], return_tensors="pt", padding=True)
        out = loaded.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=length,
            do_sample=True,
            temperature=1.0,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts += [" ".join(text.split()) for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
        print(f"{len(texts)} of {len(starts)} texts", flush=True)
    return texts


def main(what: str, model: str, *folder: str) -> None:
    loaded = load_model(model)
    if what == "facts":
        lines = [json.dumps(record, ensure_ascii=False) for record in facts(loaded, Path(folder[0]))]
        (HERE / "smollm2_facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (HERE / "smollm2_corpus.txt").write_text("\n".join(corpus(loaded)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
