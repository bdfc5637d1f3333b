"""What is trained in phase 2: all weights, or any adapter that peft knows by name.

The harness owns where an adapter sits (`targets`, resolved for the architecture); every other field of the peft
method's config passes through, validated by name and type.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from retention.types import Part, UserError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedConfig, PreTrainedModel

    from retention.models import Anatomy

# Methods of peft that are no adapters of matrices which an ordinary training trains.
OTHERS = {
    "adalora": "needs a penalty and a plan of ranks in the training loop, which trl's trainers lack",
    "adaption_prompt": "learns prompts, and moves no weight",
    "poly": "chooses among skills by a task's number, which rows do not have",
    "shadow": "runs a second model beside the first, whose weights it does not adapt",
    "trainable_tokens": "learns embeddings of single tokens, and adapts no matrix",
    "xlora": "mixes adapters that were trained before",
}
# Ways to begin LoRA that peft cannot go by itself.
NEEDS_MORE = {
    "eva": "is worked out from activations, which a training of its own would have to gather",
    "corda": "is worked out from activations, which a training of its own would have to gather",
    "loftq": "is for quantised weights, and these are float32",
}
MIXTURE = "a mixture of experts has no single matrices in its MLPs for an adapter to sit on; use targets: attention"
OWNED = ("target_modules", "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision")


REFUSALS = (
    ValueError, TypeError, NotImplementedError, AssertionError, RuntimeError, KeyError, AttributeError, ImportError,
    UserWarning, RuntimeWarning,
)  # fmt: skip  # what peft's methods raise on settings and matrices that they cannot use


class Full(Part):
    """Every weight is trained, save what a mitigation freezes."""

    name: Literal["full"] = "full"

    def key(self) -> dict[str, Any]:
        return {"name": self.name}


class Adapter(Part):
    """A peft method by its name (lora, dora, ia3, oft, vera ...). `dora` is lora with use_dora, as papers name it."""

    name: str
    targets: Literal["mlp", "attention", "all"] | tuple[str, ...] = Field(
        "all", description="the modules that are adapted, or their leaf names"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="fields of the peft method's config")

    @model_validator(mode="after")
    def _known(self) -> Adapter:
        from peft import PromptLearningConfig

        if issubclass(self.config_class(), PromptLearningConfig):
            raise ValueError(
                f"{self.name} learns a soft prompt and moves no weight, so nothing could be forgotten; "
                "use an adapter of weights, such as lora"
            )
        if self.name.lower() in OTHERS:
            raise ValueError(f"{self.name} {OTHERS[self.name.lower()]}; use an adapter of matrices, such as lora")
        validate_fields(self.peft_fields(), self.settings, OWNED, "settings", "targets")
        begun = self.settings.get("init_lora_weights")
        if begun in NEEDS_MORE:
            raise ValueError(f"settings.init_lora_weights: {begun} {NEEDS_MORE[begun]}; use true, pissa or olora")
        if isinstance(rank := self.settings.get("r"), int) and rank < 0:
            raise ValueError(f"settings.r: expected a whole number above 0, got {rank}")
        dropout = self.settings.get("lora_dropout", 0.0)
        if isinstance(dropout, (int, float)) and dropout < 0:  # peft would go on without dropout
            raise ValueError(f"settings.lora_dropout: expected a share from 0 to 1, got {dropout}")
        alpha = self.settings.get("lora_alpha", 1)
        if isinstance(alpha, (int, float)) and alpha <= 0:  # peft takes any: 0 would learn nothing, and say so nowhere
            raise ValueError(f"settings.lora_alpha: expected a number above 0 (it scales the update), got {alpha}")
        return self

    def config_class(self) -> Any:
        """The peft config class of this method. Raises ValueError with the nearest name."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {key.value.lower(): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        known["dora"] = known["pissa"] = known["lora"]
        if self.name.lower() not in known:
            near = difflib.get_close_matches(self.name.lower(), ["full", *known], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected full or one of {', '.join(sorted(known))}"
            raise ValueError(f"unknown adapter {self.name!r}{hint}")
        return known[self.name.lower()]

    def peft_fields(self) -> dict[str, Any]:
        return config_fields(self.config_class())

    def key(self) -> dict[str, Any]:
        """What of it can move a number: defaults of peft, whose version is in each key, are left away."""
        defaults = config_defaults(self.config_class())
        given = {k: v for k, v in self.settings.items() if not (k in defaults and defaults[k] == v)}
        targets = sorted(self.targets) if isinstance(self.targets, tuple) else self.targets
        return {"name": self.name.lower(), "targets": targets, "settings": given}

    def wrap(self, model: PreTrainedModel, projections: Mapping[str, Sequence[str]], *, trial: bool = False) -> Any:
        """The model with the adapter around it. `projections`: leaf names of its mlp's and attention's matrices.

        trial: on a model without values, so that what is made of the weights (pissa) is left out. Raises UserError for
        targets that the model lacks and for what peft refuses.
        """
        from peft import get_peft_model

        fixed: dict[str, Any] = {"task_type": "CAUSAL_LM", **self.settings}
        fields = self.peft_fields()
        if "target_modules" in fields:
            fixed["target_modules"] = self._targets(model, projections)
        self._found(model, self.settings.get("modules_to_save") or (), "settings.modules_to_save")
        if self.name.lower() == "dora":
            fixed["use_dora"] = True
        if self.name.lower() == "pissa":
            fixed["init_lora_weights"] = "pissa"
        if trial and isinstance(fixed.get("init_lora_weights"), str):
            fixed["init_lora_weights"] = True
        with warnings.catch_warnings():
            # peft 0.21 asks for a property by a name that transformers 5.23 has replaced, and says that it has found
            # out by itself how GPT-2 stores its matrices.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # oft would go on with the nearest number that divides the width, and the settings would tell another.
            warnings.filterwarnings("error", message="Invalid `")
            warnings.filterwarnings("error", message=r"The following \w+ keys did not match")  # rank_pattern
            try:
                wrapped = get_peft_model(model, self.config_class()(**fixed))
            except REFUSALS as error:
                if trial and "meta" in str(error):
                    raise
                said = str(error).strip() or type(error).__name__
                raise UserError(f"adapter {self.name}: peft cannot put it on this model: {said}") from None
        if not any(p.requires_grad for p in wrapped.parameters()):  # osf passes Conv1D by without a word
            kinds = sorted({type(m).__name__ for n, m in model.named_modules() if n in adapted_modules(wrapped)})
            raise UserError(
                f"adapter {self.name}: peft can train nothing with it in this model (its matrices are "
                f"{', '.join(kinds)}); use another, such as lora"
            )
        return wrapped

    def _targets(self, model: PreTrainedModel, projections: Mapping[str, Sequence[str]]) -> list[str]:
        """Names of the modules that are adapted, by which peft finds them in every block."""
        if not isinstance(self.targets, tuple):
            kinds = ("mlp", "attention") if self.targets == "all" else (self.targets,)
            if not any(projections[kind] for kind in kinds):
                raise UserError(f"adapter {self.name}: targets: {MIXTURE}")
            return sorted({leaf for kind in kinds for leaf in projections[kind]})
        self._found(model, self.targets, "targets")
        head = model.get_output_embeddings()
        under = [n for n, m in model.named_modules() if m is head]
        if any(name == t or name.endswith(f".{t}") for t in self.targets for name in under):
            # trl's losses multiply by the head's own matrix, past any adapter on it.
            raise UserError(
                f"adapter {self.name}: targets: {under[0]!r} is the head, on which an adapter would not be trained; "
                "leave it out"
            )
        return list(self.targets)

    def _found(self, model: PreTrainedModel, wanted: Sequence[str], where: str) -> None:
        """Raises UserError for a name that no module of the model has."""
        names = [name for name, _ in model.named_modules()]
        leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                near = difflib.get_close_matches(target, leaves, n=1)
                raise UserError(
                    f"adapter {self.name}: {where}: this model has no module {target!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(leaves)}")
                )

    def check(self, config: PreTrainedConfig) -> None:
        """Raises UserError if the adapter does not fit an architecture: settings, targets, kinds of matrices."""
        trainable_numbers(self, config)


_tried: dict[str, Any] = {}  # what was told of an architecture, by its configuration: a wide one takes seconds to try


def _once(key: str, make: Callable[[], Any]) -> Any:
    if key not in _tried:
        _tried[key] = make()
    return _tried[key]


def trainable_numbers(adapter: Adapter, config: PreTrainedConfig) -> int:
    """Numbers that the adapter trains in a model of this architecture, whose weights are not made.

    Raises UserError as `Adapter.check`.
    """

    def count() -> int:
        model, _, blocks = tried(adapter, config)
        return blocks * sum(p.numel() for p in model.parameters() if p.requires_grad)

    return int(_once(config.to_json_string() + adapter.model_dump_json(), count))


def tried(adapter: Full | Adapter, config: PreTrainedConfig) -> tuple[PreTrainedModel, Anatomy, int]:
    """An architecture with an adapter, where its parts are, and how many blocks each of its blocks stands for.

    No weight is loaded: the architecture is built without values, from its config alone. Its blocks are looked through
    on a copy of one block with a vocabulary of a few words. Raises UserError if the adapter does not fit.
    """
    from retention.models import anatomy

    with torch.random.fork_rng(devices=[]):
        places = _once(config.to_json_string(), lambda: anatomy(_blank(config, small=True)))
        model = _blank(config, small=False)
        if isinstance(adapter, Full):
            return model, places, 1
        projections = {"mlp": places.mlp_projections, "attention": places.attention_projections}
        try:
            return adapter.wrap(model, projections, trial=True), places, 1
        except REFUSALS as error:
            if isinstance(error, UserError):
                raise
            # It computes with the weights: let it have some, of one block.
            few = adapter.wrap(_blank(config, small=True), projections)
            return few, places, int(config.get_text_config().num_hidden_layers)


def refuse_mixture(config: PreTrainedConfig) -> None:
    """Raises UserError if the architecture's MLPs are mixtures of experts."""
    from retention import models

    if "expert" in config.to_json_string().lower():  # a cheap look: to build a deep architecture takes a second
        models.refuse_mixture(_once("blank" + config.to_json_string(), lambda: _blank(config, small=False)))


def mixes_experts(config: PreTrainedConfig) -> bool:
    """Whether the architecture's MLPs are mixtures of experts."""
    try:
        refuse_mixture(config)
    except UserError:
        return True
    return False


def _blank(config: PreTrainedConfig, *, small: bool) -> PreTrainedModel:
    """A model of an architecture without its weights: on no device, or small: one block with arbitrary numbers."""
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    if not small:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(own)
    text = own.get_text_config()
    text.vocab_size = 8
    text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 1, 2
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return AutoModelForCausalLM.from_config(own).float().eval()


def adapted_modules(model: Any) -> tuple[str, ...]:
    """Names of the modules that an adapter sits on, as the model without it calls them; none without an adapter."""
    return tuple(model.base_model.targeted_module_names) if hasattr(model, "peft_config") else ()


def own_parameters(model: PreTrainedModel, names: Collection[str]) -> dict[str, Parameter]:
    """A model's own weights, by their names before an adapter was put around it (peft calls them base_layer)."""
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in names:
            found[plain] = parameter
    return found


@contextmanager
def merged(model: PreTrainedModel, names: Collection[str]) -> Iterator[dict[str, Parameter]]:
    """Own weights that hold an adapter's update, if there is an adapter; on leaving, as before, bit for bit.

    Within another `merged` the update is in the weights already. Yields the own parameters by name. Raises UserError
    for a peft method whose update cannot be merged.
    """
    own = own_parameters(model, names)
    saved = {name: parameter.detach().clone() for name, parameter in own.items()}
    inside = any(getattr(module, "merged", False) is True for module in model.modules())  # of another `merged`
    adapted: Any = model if hasattr(model, "peft_config") and not inside else None
    try:
        if adapted is not None:
            try:
                adapted.merge_adapter()
            except (NotImplementedError, AttributeError, ValueError) as error:
                raise UserError(f"adapter: its update cannot be merged into the weights: {error}") from None
        yield own
    finally:
        if adapted is not None:
            with warnings.catch_warnings():
                # peft divides by what it has multiplied with; the weights are put back by copy, below.
                warnings.filterwarnings("ignore", message=r"Unmerge result can be inaccurate")
                try:
                    adapted.unmerge_adapter()
                except NotImplementedError:  # osf: the layers need only be told that they hold no update now
                    for module in adapted.modules():
                        if getattr(module, "merged_adapters", None):
                            module.merged_adapters = []
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])


def config_fields(config: Any) -> dict[str, Any]:
    """Field name -> type of a configuration dataclass, without what only its base machinery uses."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def config_defaults(config: Any) -> dict[str, Any]:
    """Field name -> default of a configuration dataclass, of the fields that have one."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def validate_fields(
    fields: dict[str, Any], given: dict[str, Any], owned: tuple[str, ...], where: str, instead: str
) -> None:
    """Check pass-through settings by name and type. Raises ValueError with all mistakes."""
    problems = []
    for name, value in given.items():
        if name in owned:
            problems.append(f"{where}.{name} is set by the harness; use `{instead}`")
        elif name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            problems.append(f"{where}.{name}: unknown" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            problem = type_problem(fields[name], value)
            if problem:
                problems.append(f"{where}.{name}: {problem}, got {value!r}")
    if problems:
        raise ValueError("\n".join(problems))


def type_problem(kind: Any, value: Any) -> str | None:
    """Why a YAML value is not of a config field's type, or None."""
    try:
        TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(value, strict=True)
    except ValidationError as strict:
        try:  # enums are written by their value, tuples and sets as lists: what a YAML file can say
            if isinstance(value, (str, list)):
                TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(value)
                if not _numeric_text(kind, value):
                    return None
        except ValidationError:
            pass
        message = strict.errors(include_url=False)[0]["msg"]
        return message[0].lower() + message[1:]
    return None


def _numeric_text(kind: Any, value: Any) -> bool:
    """Whether lax validation would have read a text as a number or a truth value."""
    if not isinstance(value, str):
        return False
    out = TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(value)
    return isinstance(out, (bool, int, float))


AnyAdapter = Annotated[
    Annotated[Full, Tag("full")] | Annotated[Adapter, Tag("peft")],
    Discriminator(
        lambda v: "full" if (v.get("name") if isinstance(v, dict) else getattr(v, "name", None)) == "full" else "peft"
    ),
]
