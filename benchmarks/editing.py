"""How much faster ROME and MEMIT are than the published order of work, at equal results.

    python benchmarks/editing.py [--model smollm2|toy|DIR ...] [--edits FILE] [--json]

toy: a randomly initialised GPT-2 of 12 layers, d 512, vocabulary 50,257. Without --model: SmolLM2, if it was fetched
(`retention fetch smollm2`), and the toy. Ten edits, or those of FILE: JSON lines with subject, prompt (with {}),
target. Both sides get the same model, edits, prefixes and documents; one thread; CPU seconds of this process. The
published side is benchmarks/published.py; its v* is timed in bfloat16 too, as is ours, where the processor has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import machine
import torch
import transformers
from published import LONGEST, Published

from retention import half
from retention.editors._base import preserved
from retention.editors._keys import Covariance, KeyWalk, covariances, factored, mean_keys
from retention.editors._rows import statement_rows
from retention.editors._solve import least_squares
from retention.editors._values import ValueSettings, target_values
from retention.editors.memit import Memit
from retention.editors.rome import Rome
from retention.models import anatomy, load_model, max_positions
from retention.types import Edit, EditResult, Fact

EDITS = [
    ("Danielle Darrieux", "The mother tongue of {} is", "English"),
    ("Edwin of Northumbria", "The official religion of {} is", "Islam"),
    ("Toko Yasuda", "{} produces the most amazing music on the", "piano"),
    ("Autonomous University of Madrid", "{}, which is located in", "Sweden"),
    ("Thomas Joannes Stieltjes", "{} was a native speaker of", "Catalan"),
    ("Beats Music", "{} is owned by", "Microsoft"),
    ("Anaal Nathrakh", "{}, that was created in", "Philadelphia"),
    ("Shree Pundalik", "{}, created in the country of", "Mexico"),
    ("Kieran Millan", "The profession of {} is", "cricketer"),
    ("Kryvyi Rih", "The twin city of {} is", "Stuttgart"),
]
STARTS = ["The old house", "Therefore we all", "Because it rained", "I have seen", "You would not"]
SYLLABLES = "an be co de en fi gar hol in jo ka lo mer no or pa ra st tu ve"
LONG = [
    "The weather in the north was cold and",
    "Therefore the council decided to vote on the",
    "Because of the storm the boats stayed in",
    "I think that the answer to this is not",
    "You may find that the first of these was",
    "The people of the town had come to see",
    "Therefore it was not until the next year that",
    "Because she had no money the young woman",
    "I was told by a friend of mine that",
    "You can see the river from the top of",
]


def words(rng: random.Random, n: int) -> str:
    """Made-up text with the letter statistics of nothing in particular, but words of natural length."""
    syllables = SYLLABLES.split()
    return " ".join("".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(n))


def random_model(folder: Path, layers: int, width: int, vocabulary: int = 50257) -> None:
    """A GPT-2 with random weights, and a byte-level BPE that cuts words about as GPT-2's own does."""
    from tokenizers import ByteLevelBPETokenizer

    rng = random.Random(0)
    # Prompts, prefixes and targets of common words are cut into whole words, names into pieces: with GPT-2's own
    # tokenizer the rows of one edit have about as many tokens.
    common = [*STARTS, *LONG, *(prompt.format("it") for _, prompt, _ in EDITS), *(f"is {word}" for *_, word in EDITS)]
    bpe = ByteLevelBPETokenizer()
    texts = common * 8 + [words(rng, 2000)]
    bpe.train_from_iterator(texts, vocab_size=1200, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    tokenizer = transformers.GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=width // 64, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)


def read_edits(file: Path | None) -> list[Edit]:
    records = [dict(zip(("subject", "prompt", "target"), edit, strict=True)) for edit in EDITS]
    if file is not None:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Edit(
            fact=Fact(id=str(i), subject=r["subject"], relation="", prompt=r["prompt"], target=""),
            target=r["target"],
            prompts=(r["prompt"],),
        )
        for i, r in enumerate(records)
    ]


class Clock:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def __call__(self, stage: str) -> None:
        now = time.process_time()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def total(self, *, without: tuple[str, ...] = ()) -> float:
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in without)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference against the norm of what is expected, the largest over rows of a batch of vectors."""
    found, expected = found.double(), expected.double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def of_update(result: EditResult, name: str, expected: torch.Tensor) -> float:
    return float((result.delta.dense(name).double() - expected.double()).norm() / expected.double().norm())


def run(folder: Path, edits: list[Edit], args: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Both sides, stage by stage. kept: an empty folder; ours puts each v* there, so that none is searched twice."""
    loaded = load_model(folder, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    rng = random.Random(1)
    texts = [words(rng, rng.randint(30, 90)) for _ in range(args.documents)]
    places = anatomy(model)
    low = min(3, places.layers // 4)
    layers = list(range(low, min(low + 5, places.layers - 1)))  # 3 to 7 of 12 or more
    rome_layer = layers[len(layers) // 2]
    settings = {"v_steps": args.steps, "v_lr": 0.5, "v_weight_decay": 0.5, "kl_factor": 0.0625}
    weight = 15000.0
    differences: dict[str, float] = {}
    with preserved(model, 0):
        # ------------------------------------------------------------------------------------ covariance
        clock, ours = Clock(), Clock()
        base = Published(model, tokenizer, STARTS, {**settings, "clamp_norm_factor": 0.75})
        clock("")
        expected_c = {layer: base.covariance(layer, texts) for layer in layers}
        clock("covariance")
        sample = Covariance(tokens=10**9, length=min(max_positions(model) or LONGEST, LONGEST))
        ours("")
        found_c = covariances(model, tokenizer, layers, texts, sample)
        ours("covariance")
        differences["covariance"] = max(
            float((found_c[i] - expected_c[i]).norm() / expected_c[i].norm()) for i in layers
        )
        # As published, C has no ridge; the documents must then be more than the keys are wide.
        metrics = {layer: factored(expected_c[layer], args.ridge) for layer in layers}
        ours("factor")
        for layer in layers:
            expected_c[layer].diagonal().add_(args.ridge * expected_c[layer].diagonal().mean())

        # ----------------------------------------------------------------------------------------- MEMIT
        values = ValueSettings(steps=args.steps, lr=0.5, weight_decay=0.5, clamp=0.75, kl_factor=0.0625)
        prefixes = [start + ". " for start in STARTS]
        memit = Memit(layers=tuple(layers), covariance_weight=weight, clamp_norm_factor=0.75, **settings)
        base = Published(model, tokenizer, prefixes, {**settings, "clamp_norm_factor": 0.75})
        clock("")
        pairs = [base.value(edit, layers[-1], "block") for edit in edits]
        clock("v_star")
        expected_v = torch.stack([value for value, _ in pairs])
        updates = base.memit(edits, layers, expected_v, expected_c, weight, clock)
        if half.on_processor():
            with half.products("bfloat16", model):
                for edit in edits:
                    base.value(edit, layers[-1], "block")
            clock("v_star_bfloat16")
        ours("")
        found_v = target_values(
            model, tokenizer, edits, layer=layers[-1], site="block", settings=values, prefixes=prefixes, cache=kept
        )
        ours("v_star")
        if half.on_processor():
            with half.editing("bfloat16"):
                target_values(
                    model, tokenizer, edits, layer=layers[-1], site="block", settings=values, prefixes=prefixes
                )
            ours("v_star_bfloat16")
        result = memit.write_after(model, tokenizer, edits, metrics=metrics, prefixes=prefixes, cache=kept)
        ours("memit_rest")
        differences["memit_v_star"] = difference(found_v.value, expected_v)
        differences["memit_update"] = max(of_update(result, name, update) for name, update in updates.items())
        work = {"memit": _work(base, len(edits))}

        rows = statement_rows(tokenizer, edits, prefixes)
        walk = KeyWalk(model, places, rows, layers[0])
        keys = mean_keys(walk.keys(), rows, len(edits))
        residuals = expected_v - walk.values(layers[-1], "block")[[i for i, row in enumerate(rows) if row.direct]]
        ours("")
        for layer in layers:
            least_squares(metrics[layer], weight, keys, residuals)
        ours("solve")

        # ------------------------------------------------------------------------------------------ ROME
        some = edits[: args.rome_edits]
        prefixes = [text + ". " for text in [*STARTS, *STARTS[::-1], *LONG]]
        rome = Rome(layer=rome_layer, clamp_norm_factor=4.0, **settings)
        base = Published(model, tokenizer, prefixes, {**settings, "clamp_norm_factor": 4.0})
        slow = Clock()
        pairs = [base.value(edit, rome_layer, "mlp") for edit in some]
        slow("v_star")
        expected_v = torch.stack([value for value, _ in pairs])
        update = base.rome(some, rome_layer, expected_v, expected_c[rome_layer], slow)
        ours("")
        found_v = target_values(
            model, tokenizer, some, layer=rome_layer, site="mlp", prefixes=prefixes, cache=kept,
            settings=ValueSettings(steps=args.steps, lr=0.5, weight_decay=0.5, clamp=4.0, kl_factor=0.0625),
        )  # fmt: skip
        ours("rome_v_star")
        metric = factored(found_c[rome_layer], args.ridge)
        result = rome.write_after(
            model, tokenizer, some, layer=rome_layer, metric=metric, prefixes=prefixes, cache=kept
        )
        ours("rome_rest")
        assert len(list(kept.iterdir())) == 2, "a v* was searched twice, and the totals count one of them"
        differences["rome_v_star"] = difference(found_v.value, expected_v)
        differences["rome_update"] = of_update(result, f"{places.down.format(rome_layer)}.weight", update)
        work["rome"] = _work(base, len(some))

    theirs, mine = clock.seconds, ours.seconds
    memit_theirs = clock.total(without=("", "covariance", "v_star_bfloat16"))
    memit_mine, rome_mine = mine["v_star"] + mine["memit_rest"], mine["rome_v_star"] + mine["rome_rest"]
    one = theirs["covariance"] / len(layers)
    return {
        "ratio": {
            "v_star": theirs["v_star"] / mine["v_star"],
            **in_bfloat16(theirs, mine),
            "rome_v_star": slow.seconds["v_star"] / mine["rome_v_star"],
            "covariance": theirs["covariance"] / mine["covariance"],
            "solve": theirs["solve"] / mine["solve"],
            "memit_total": memit_theirs / (memit_mine + mine["factor"]),
            "rome_total": slow.total() / rome_mine,
            "memit_total_with_covariance": (memit_theirs + theirs["covariance"])
            / (memit_mine + mine["factor"] + mine["covariance"]),
            "memit_total_covariance_cached": memit_theirs / memit_mine,
            "rome_total_with_covariance": (slow.total() + one) / (rome_mine + mine["covariance"] / len(layers)),
        },
        "max_relative_difference": max(differences.values()),
        "relative_differences": differences,
        "seconds": {
            "published": {k: v for k, v in theirs.items() if k} | {f"rome_{k}": v for k, v in slow.seconds.items()},
            "ours": {k: v for k, v in mine.items() if k},
        },
        "published_work_per_edit": work,
        "fast": found_v.fast,
        "sizes": {
            "layers": places.layers, "width": places.hidden, "vocabulary": model.config.vocab_size,
            "edits": len(edits), "rome_edits": len(some), "documents": args.documents, "steps": args.steps,
            "edited_layers": layers, "parameters": sum(p.numel() for p in model.parameters()),
        },
        "machine": machine.about(),
    }  # fmt: skip


def in_bfloat16(theirs: dict[str, float], mine: dict[str, float]) -> dict[str, float]:
    """Ratios of v*, each named by ours; nothing where the processor has no bfloat16 products."""
    if "v_star_bfloat16" not in mine:
        return {}
    return {
        "v_star_bfloat16_over_published_float32": theirs["v_star"] / mine["v_star_bfloat16"],
        "v_star_bfloat16_over_published_bfloat16": theirs["v_star_bfloat16"] / mine["v_star_bfloat16"],
    }


def _work(base: Published, edits: int) -> dict[str, Any]:
    """Forward passes of v* per edit, and the tokens in one of them."""
    forwards, tokens = base.count.forwards["v_star"], base.count.tokens["v_star"]
    return {"v_star_forwards": forwards / edits, "tokens_per_forward": tokens / forwards,
            "v_star_tokens": tokens / edits, "key_forwards": base.count.forwards["keys"] / edits}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="toy, a fetched model or a folder; may be given several times")
    parser.add_argument("--edits", type=Path, help="JSON lines: subject, prompt, target")
    parser.add_argument("--most", type=int, help="edits at most: the first ones")
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--width", type=int, default=512, help="of the random model")
    parser.add_argument("--documents", type=int, default=40, help="for the covariance, some 120 tokens each")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of v*'s loss")
    parser.add_argument("--rome-edits", type=int, default=2, help="edits for ROME, whose published v* takes longest")
    parser.add_argument("--ridge", type=float, default=1e-4, help="of the covariance, on both sides")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    results = {}
    for name, folder in machine.models(args.model).items():
        with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory() as kept:
            if folder is None:
                folder = Path(temporary)
                random_model(folder, args.layers, args.width)
            results[name] = run(folder, read_edits(args.edits)[: args.most], args, Path(kept))
    if args.json:
        print(json.dumps(results))
        return
    for model, result in results.items():
        print(model)
        for name, ratio in result["ratio"].items():
            print(f"{name:40} {ratio:8.1f} x")
        for part in ("seconds", "relative_differences", "published_work_per_edit", "sizes", "machine"):
            print(part, json.dumps(result[part], indent=1))


if __name__ == "__main__":
    main()
