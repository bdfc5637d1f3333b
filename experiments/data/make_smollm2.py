"""Make the data of experiments/smollm2_quickstart.yaml: facts that SmolLM2 knows, and a corpus that it wrote itself.

    python experiments/data/make_smollm2.py facts MODEL TREX_FOLDER    # smollm2_facts.jsonl, smollm2_calibration.jsonl
    python experiments/data/make_smollm2.py corpus MODEL               # smollm2_corpus.txt

Facts: subject, relation and object are T-REx's (LAMA's split, `trex_lms_vocab/P*.jsonl` of ParaRel's repository); all
phrasings are our own. A fact is taken where its subject has one object of the relation and the model gives the object
in the direct phrasing. The false new object is drawn from the other objects of the relation. Studies draw from
smollm2_facts.jsonl; smollm2_calibration.jsonl, of other subjects, is for `retention calibrate`.

Corpus: sampled from the model after topics of our own, for the covariance of keys, so that the quickstart needs no one
else's text.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from retention.models import Loaded, load_model
from retention.probes import Score
from retention.types import Question

HERE = Path(__file__).parent
SEED, WANTED, CALIBRATION, OF_RELATION, OF_OBJECT = 0, 200, 200, 45, 12
ASKED = 220  # facts of a relation that are put to the model, at most

# relation -> (name, direct phrasing and others that may be written with, phrasings that only probes ask)
PHRASINGS: dict[str, tuple[str, list[str], list[str]]] = {
    "P17": ("country", ["{} is a place in the country of", "{} can be found in the country of",
                        "The country that {} is in is"],
            ["{} is part of the country of", "On a map, {} is inside the borders of"]),
    "P20": ("place of death", ["{} died in the city of", "The life of {} ended in the city of",
                               "The city where {} died is"],
            ["The last home of {} was in", "{} spent the last days of life in"]),
    "P30": ("continent", ["{} lies on the continent of", "{} is on the continent of", "The continent that {} is on is"],
            ["{} is one of the places of the continent of", "Maps show {} on the continent of"]),
    "P36": ("capital", ["The capital of {} is", "{} has its capital in the city of",
                        "{} is governed from its capital,"],
            ["The government of {} sits in the city of", "The capital city of {} is called"]),
    "P37": ("official language", ["The official language of {} is", "The laws of {} are written in",
                                  "The language of the state in {} is"],
            ["Public offices in {} use the language", "Most road signs in {} are in"]),
    "P103": ("native language", ["The native language of {} is", "As a child, {} spoke", "The mother tongue of {} is"],
             ["At home, the family of {} spoke", "The first language that {} learned was"]),
    "P140": ("religion", ["The official religion of {} is", "{} follows the religion of",
                          "Most people in {} believe in"],
             ["In matters of faith, {} belongs to", "The religion that {} is part of is"]),
    "P159": ("headquarters", ["The headquarters of {} are in the city of", "The main office of {} is in",
                              "{} has its head office in the city of"],
             ["{} is run from the city of", "The board of {} meets in the city of"]),
    "P176": ("maker", ["The {} is made by the company", "The maker of the {} is", "The company that builds the {} is"],
             ["The {} is a product of the company", "The {} comes out of a factory of"]),
    "P178": ("developer", ["{} was developed by the company", "The developer of {} is the company",
                           "{} is software from the company"],
             ["The company that wrote {} is", "The programmers of {} worked for"]),
    "P407": ("language", ["{} is written in", "The text of {} is in", "The language of {} is"],
             ["The pages of {} are printed in", "Readers of {} have to know"]),
    "P495": ("country of origin", ["{} comes from the country of", "The country of origin of {} is",
                                   "{} was created in the country of"],
             ["The people who made {} lived in", "{} is a product of the country of"]),
    "P1303": ("instrument", ["{} is known for playing the", "The instrument of {} is the", "On stage, {} plays the"],
              ["The instrument that {} plays is the", "{} is a master of the"]),
    "P1376": ("capital of", ["{} is the capital of", "As a capital, {} belongs to", "{} is the capital city of"],
              ["The government in {} is the government of", "{} is the seat of the government of"]),
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


def of_relation(loaded: Loaded, folder: Path, relation: str) -> list[dict[str, Any]]:
    """Records of one relation, OF_RELATION at most."""
    name, written, held_out = PHRASINGS[relation]
    rng = random.Random(f"{SEED} {relation}")
    pairs = triples(folder, relation)
    everything = sorted({o for _, o in pairs})
    # An object that the subject's name gives away ("Renault Clio") is no knowledge.
    pairs = [(s, o) for s, o in pairs if not set(s.lower().split()) & set(o.lower().split())]
    asked = rng.sample(pairs, min(ASKED, len(pairs)))
    right = known(loaded, [(written[0].format(s), o) for s, o in asked])
    chosen = [pair for pair, yes in zip(asked, right, strict=True) if yes]
    found: list[dict[str, Any]] = []
    of_object: dict[str, int] = defaultdict(int)
    for subject, true in chosen:
        others = [o for o in everything if o != true and o not in subject and true not in o and o not in true]
        if of_object[true] == OF_OBJECT or len(found) == OF_RELATION or not others:
            continue
        of_object[true] += 1
        found.append(
            {
                "id": f"{relation} {subject}", "subject": subject, "relation": name, "object": true,
                "target_new": rng.choice(others), "prompts": written, "paraphrases": held_out,
                "source": f"T-REx (LAMA), {relation}",
            }
        )  # fmt: skip
    print(f"{relation} {name}: {sum(right)} of {len(right)} known, {len(found)} taken")
    return found


def parted(kept: Sequence[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """WANTED records at most, from all relations in turn, and CALIBRATION of other subjects."""
    in_turn = [r for turn in itertools.zip_longest(*kept) for r in turn if r is not None]
    taken = {r["subject"] for r in in_turn[:WANTED]}
    rest = [r for r in in_turn[WANTED:] if r["subject"] not in taken]
    return sorted(in_turn[:WANTED], key=itemgetter("id")), sorted(rest[:CALIBRATION], key=itemgetter("id"))


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
        kept = [of_relation(loaded, Path(folder[0]), relation) for relation in PHRASINGS]
        for name, records in zip(("facts", "calibration"), parted(kept), strict=True):
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            (HERE / f"smollm2_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (HERE / "smollm2_corpus.txt").write_text("\n".join(corpus(loaded)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
