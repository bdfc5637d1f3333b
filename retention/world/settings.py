"""Settings of the pretraining recipe and of the embedded world. Knows neither model nor text."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from retention import half
from retention.types import Part

RECIPE_VERSION = 3  # raised whenever equal settings would give other weights


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; one that does not takes 40 times as long as by float32.

    What it says is written into the settings of a model, and so into its key.
    """
    return half.on_processor()


class Recipe(Part):
    """Size of the model (Llama architecture, tied embeddings) and how it is pretrained on statements of facts."""

    seed: int = Field(default=0, ge=0)  # of the world, the order of the stream, and the initial weights
    layers: PositiveInt = 4
    width: PositiveInt = 192  # of the residual stream; more is not better for editing
    heads: PositiveInt = 4
    mlp: PositiveInt = 1024  # neurons of each MLP
    context: PositiveInt = 64  # tokens of one row of a batch
    rows: PositiveInt = 32  # rows of one batch
    exposures: PositiveInt = 17  # statements of each fact in the main part of pretraining
    warm_exposures: PositiveInt = 52  # statements of each fact of the first part, which keeps to a few subjects
    matrix_lr: PositiveFloat = 0.02  # Muon, on the hidden matrices
    vector_lr: PositiveFloat = 0.01  # AdamW, on embeddings and norms
    momentum: float = Field(default=0.95, ge=0, lt=1)  # of Muon
    weight_decay: float = Field(default=0.01, ge=0)  # of Muon; AdamW has none
    warmup: float = Field(
        default=0.05, ge=0, lt=1
    )  # share of the steps over which the learning rates rise; cosine to 0 then
    clip: PositiveFloat = 1.0  # largest norm of the gradient
    init_std: PositiveFloat = 0.02  # standard deviation of the initial weights
    # Products in bfloat16, the weights stay float32. Default: where the processor has it in hardware.
    bf16: bool = Field(default_factory=lambda: native_bf16())


class Pretraining(Recipe):
    """Settings of `retention pretrain`: a model of one's own facts and text, of any size."""

    # With 18 exposures real facts are recalled as well, but edits then hurt their neighbors.
    exposures: PositiveInt = 32  # statements of each fact in the main part of pretraining
    warm_exposures: PositiveInt = 60  # and of each fact of the first part
    vocabulary: PositiveInt = 8000  # tokens of the byte-level BPE, at most
    held_out: int = Field(default=2, ge=0)  # phrasings of each fact of a file that pretraining never sees
    passages: PositiveInt | None = None  # of the text, drawn by seed; left out, all
    context: int = Field(default=64, ge=8)  # tokens of one row; a longer passage is cut into several documents
    heldout_passages: int = Field(default=200, ge=0)  # of the text, never trained on: the held-out loss is theirs
    device: Literal["cpu", "cuda"] = "cpu"
    compile: bool = False  # by torch.compile: some minutes at first, fewer passes over memory then
    checkpoint_seconds: PositiveFloat = 60.0  # between two checkpoints that an interrupted pretraining goes on from

    @model_validator(mode="before")
    @classmethod
    def _half_on_a_gpu(cls, given: Any) -> Any:
        return {"bf16": True, **given} if isinstance(given, dict) and given.get("device") == "cuda" else given

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be divisible by heads ({self.heads})")
        if self.width // self.heads % 2:
            raise ValueError(f"width ({self.width}) / heads ({self.heads}) must be even: positions turn pairs")
        return self


class WorldSettings(Recipe):
    """Size of the embedded world, besides the recipe."""

    people: PositiveInt = 320
    new_people: int = Field(
        60, ge=0
    )  # people of downstream questions only; pretraining knows their last names as streets
    cities: PositiveInt = 40
    companies: PositiveInt = 40
    countries: PositiveInt = 12
    held_out: int = Field(default=3, ge=1, le=8)  # phrasings of each fact that pretraining never sees
    place_factor: PositiveFloat = 3.0  # facts of cities, companies and countries are few: stated so many times as often
    warm_people: PositiveInt = 40  # people whom the first part of pretraining keeps to
    withheld: int = Field(default=80, ge=0)  # facts that pretraining leaves out, of as many people, to be injected
    graded: int = Field(default=105, ge=0)  # facts stated from 3 to 192 times, of as many people
    filler: float = Field(default=0.15, ge=0, lt=1)  # share of the sentences that are about nobody
