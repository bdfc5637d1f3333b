"""What is wrong with a user's settings, as sentences: the path of the key, what was expected, what to type instead.

Works on any pydantic model made of parts (mappings with a `name`); knows none of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(
    error: ValidationError, root: type[BaseModel], settings: Mapping[str, Any], index: Mapping[str, int]
) -> Iterator[str]:
    """Each of pydantic's errors as: path: what is wrong, what to type instead.

    root: the model that the settings were validated as. index: grid key -> which of its values the settings hold; their
    paths are told as grid.key[i].
    """
    for item in error.errors(include_url=False):
        kind, context = item["type"], item.get("ctx", {})
        loc = _clean(item["loc"], settings, keep_last=kind == "missing")
        path = _path(loc, index)
        if kind == "extra_forbidden":
            owner = _owner(loc[:-1], root, settings)
            yield f"{path}: unknown key" + (nearest(str(loc[-1]), owner.model_fields) if owner is not None else "")
        elif kind == "union_tag_invalid":
            expected = [e.strip().strip("'") for e in context["expected_tags"].split(",")]
            yield f"{path}: unknown name {context['tag']!r}{nearest(context['tag'], expected)}"
        elif kind == "union_tag_not_found":
            yield f"{path}: expected a name, or a mapping with a `name`"
        elif kind == "missing":
            yield f"{path}: required, but not given"
        elif kind == "value_error":
            prefix = f"{path}: " if path else ""
            yield prefix + str(context["error"])
        else:
            yield f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _clean(loc: tuple[Any, ...], settings: Mapping[str, Any], *, keep_last: bool) -> tuple[Any, ...]:
    """pydantic's location without the union tags that it puts between the keys.

    keep_last: the last step is a key that is missing in the settings, so it is no tag although it is not there.
    """
    out: list[Any] = []
    tree: Any = settings
    for i, step in enumerate(loc):
        is_key = keep_last and i + 1 == len(loc)
        tags = ("hub", "peft", "one", "many", tree.get("name") if isinstance(tree, Mapping) else None)
        if not isinstance(step, int) and step in tags and not (isinstance(tree, Mapping) and (step in tree or is_key)):
            continue
        if not isinstance(step, int) and not isinstance(tree, Mapping):  # the member of a union that was tried
            continue
        out.append(step)
        if isinstance(tree, Mapping):
            tree = tree.get(step)
        elif isinstance(tree, list) and isinstance(step, int) and step < len(tree):
            tree = tree[step]
        else:
            tree = None
    return tuple(out)


def _path(loc: Iterable[Any], index: Mapping[str, int]) -> str:
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    for key, i in index.items():
        if text == key or text.startswith((f"{key}.", f"{key}[")):
            return f"grid.{key}[{i}]{text[len(key) :]}"
    return text


def _owner(loc: Sequence[Any], root: type[BaseModel], settings: Mapping[str, Any]) -> type[BaseModel] | None:
    """The part whose fields an unknown key was meant for; None where its name tells none."""
    candidates: list[type[BaseModel]] = [root]
    tree: Any = settings
    for step in loc:
        if not isinstance(step, int):
            owner = _chosen(candidates, tree)
            if owner is None:
                return None
            candidates = _parts(owner.model_fields[step].annotation)
        tree = tree[step]
    return _chosen(candidates, tree)


def _chosen(candidates: Sequence[type[BaseModel]], tree: Any) -> type[BaseModel] | None:
    """The one of a union's classes that the mapping's name asks for; else the one that takes any name."""
    if len(candidates) == 1:
        return candidates[0]
    name = tree.get("name") if isinstance(tree, Mapping) else None
    named = [part for part in candidates if name in _names(part)]
    return next(iter([*named, *(part for part in candidates if not _names(part))]), None)


def _parts(union: Any) -> list[type[BaseModel]]:
    """The classes of an annotated union."""
    if isinstance(union, type) and issubclass(union, BaseModel):
        return [union]
    return [part for arg in get_args(union) for part in _parts(arg)]


def _names(part: type[BaseModel]) -> tuple[str, ...]:
    return get_args(part.model_fields["name"].annotation) if "name" in part.model_fields else ()


def nearest(word: str, known: Iterable[str]) -> str:
    """What to type instead of an unknown word, as the end of a sentence."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def infinite(settings: Mapping[str, Any], index: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each number that is infinite or NaN: JSON has none, and keys are made of JSON."""
    return (f"{_path(loc, index)}: expected a finite number" for loc in _not_finite(settings, ()))


def _not_finite(tree: Any, loc: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, float) and not math.isfinite(tree):
        yield loc
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for step, value in items:
        yield from _not_finite(value, (*loc, step))
