"""Public data that studies here cite, from the repositories that hold them, at pinned commits, below $RETENTION_DATA.

Every file is checked against a pinned SHA-256 before it is put in place. Knows no fact source.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from retention.types import UserError

RAW = "https://raw.githubusercontent.com"
SECONDS = 60  # without an answer
CHAIN = "Jometeorie/KnowledgeSpread/51d7402617c2e52bde0dc11b76e400c3725a181a"
PARAREL = "yanaiela/pararel/cb5554678457beb5ac163d888f1ce8cf174b3f0b"
LOCFT = "ICT-STAR/LocFT/51db7854feb3596085051e45bf8b3147bfb0ccb1"
WIKITEXT = "DRAGNLabs/LLMHumanModeling/379149361c70592030e47c6df842d43f547dfd43"
RELATIONS = tuple(
    f"P{n}"
    for n in (
        1001, 101, 103, 106, 108, 127, 1303, 131, 136, 1376, 138, 140, 1412, 159, 17, 176, 178, 19, 190, 20, 264, 27,
        276, 279, 30, 31, 36, 361, 364, 37, 39, 407, 413, 449, 463, 47, 495, 527, 530, 740, 937,
    )
)  # fmt: skip
WITHOUT_PATTERNS = ("P31", "P527")

Get = Callable[[str], bytes]  # REPOSITORY/COMMIT/PATH -> the file's bytes


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: how it is made from what the repository holds, and what it must be."""

    make: Callable[[Get], dict[str, bytes]]  # place below $RETENTION_DATA -> content
    sha256: str  # of the SHA-256 digests of all files, in the order of their places
    licence: str
    source: str


def fetch_data(name: str, say: Callable[[str], None] = print) -> list[Path]:
    """Download a data set into $RETENTION_DATA and check it; returns its files. What is there already stays.

    Raises UserError where RETENTION_DATA is not set, where the source is not reached or gives another file than the
    pinned one, and where another file is in the place.
    """
    data, root = DATA[name], os.environ.get("RETENTION_DATA")
    if not root:
        raise UserError(f"fetch: set RETENTION_DATA to the folder that {name} is to be put into")
    say(f"{name}: {data.source}\nlicence: {data.licence}")
    made = data.make(_get)
    found = digest(made)
    if found != data.sha256:
        raise UserError(
            f"fetch: {name}, as downloaded, is not what is pinned here: its digest is {found}, expected {data.sha256}"
        )
    places = {Path(root).expanduser() / place: content for place, content in made.items()}
    for path, content in places.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"fetch: {path} is there already and is another file: move it away first")
    for path, content in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(content)
        part.replace(path)
    return list(places)


def digest(made: Mapping[str, bytes]) -> str:
    """SHA-256 over the SHA-256 digests of the files, in the order of their places."""
    return hashlib.sha256(b"".join(hashlib.sha256(made[place]).digest() for place in sorted(made))).hexdigest()


def _get(place: str) -> bytes:
    url = f"{RAW}/{place}"
    try:
        with urlopen(url, timeout=SECONDS) as answer:
            content: bytes = answer.read()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"fetch: {url} is not reached from here ({reason}): download it where it is, and put the data below "
            "$RETENTION_DATA by hand (the README says which files belong where)"
        ) from None
    return content


# ------------------------------------------------------------------------------------------------ what is made


def _trex(get: Get) -> dict[str, bytes]:
    patterned = [relation for relation in RELATIONS if relation not in WITHOUT_PATTERNS]
    kinds = {"trex_lms_vocab": RELATIONS, "pattern_data/graphs_json": patterned}
    return {
        f"trex_pararel/{folder}/{relation}.jsonl": get(f"{PARAREL}/data/{folder}/{relation}.jsonl")
        for folder, relations in kinds.items()
        for relation in relations
    }


def _counterfact(get: Get) -> dict[str, bytes]:
    """The flat records, with the relations that T-REx has between their subject and their old object."""
    known: dict[tuple[str, str], list[str]] = {}
    for relation in RELATIONS:
        for line in get(f"{PARAREL}/data/trex_lms_vocab/{relation}.jsonl").decode().splitlines():
            fact = json.loads(line)
            found = known.setdefault((fact["sub_label"], fact["obj_label"]), [])
            found.extend([relation] * (relation not in found))
    lines = []
    for record in _records(get(f"{CHAIN}/data/counterfact/counterfact-edit.json")):
        candidates = known.get((record["subject"], record["ground_truth"]), [])
        lines.append(json.dumps({**record, "split": "edit", "relation_candidates": candidates}, ensure_ascii=False))
    return {"counterfact/counterfact_10k.jsonl": ("\n".join(lines) + "\n").encode()}


def _zsre(get: Get) -> dict[str, bytes]:
    records = _records(get(f"{LOCFT}/data/zsre/zsre_3k.json"))
    return {"zsre/zsre_3k.json": json.dumps(records, indent=0, ensure_ascii=False).encode()}


def _wikitext(get: Get) -> dict[str, bytes]:
    names = ("wiki.valid.raw", "wiki.test.raw")
    return {f"wikitext-2/{name}": get(f"{WIKITEXT}/data/{name}").replace(b"\r\n", b"\n") for name in names}


def _records(content: bytes) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(content)
    except ValueError as error:
        raise UserError(f"fetch: what was downloaded is no JSON ({error}); is there a proxy that answers?") from None
    return found


DATA: Mapping[str, Data] = {
    "counterfact": Data(
        make=_counterfact,
        sha256="33fb8fd99e246b5211f0416aa25b396c82283c08673bdf24a5fd1ec1b7f905cc",
        licence="MIT",
        source=f"CounterFact (Meng et al. 2022), flat records of {CHAIN}; relations from {PARAREL}",
    ),
    "trex": Data(
        make=_trex,
        sha256="fd6fb3ac98ff09a629310f4550e49cc394db0bd076e7e6ddca1950ca65dbc22a",
        licence="MIT",
        source=f"T-REx (Elsahar et al. 2018) and ParaRel (Elazar et al. 2021), {PARAREL}",
    ),
    "zsre": Data(
        make=_zsre,
        sha256="4ee8db942db7d4f48328088449d4747961c1b921c358b5174bc95504fab21575",
        licence="MIT",
        source=f"zsRE (Levy et al. 2017) in the form of MEND, {LOCFT}",
    ),
    "wikitext": Data(
        make=_wikitext,
        sha256="4af200886465269682e5334e8c5999cc009bec6faebaaa73121b81b8db9b77c8",
        licence="CC BY-SA",
        source=f"WikiText-2 raw (Merity et al. 2016), validation and test, as in {WIKITEXT}",
    ),
}
