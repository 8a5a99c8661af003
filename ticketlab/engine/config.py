"""What an IMP study is: every choice that decides a stored bit, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from ticketlab import shown
from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.recipe import OWN, Elsewhere, Recipe, own_name
from ticketlab.engine.treatments import RETRAINING, TREATMENTS
from ticketlab.errors import Refused, check_fields, nearest

Scope = Literal["global", "layer"]
Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class ImpConfig:
    """An IMP study: seeds x treatments, trained and pruned level after level."""

    task: str = "digits"
    """Data set: digits, stdlib_lm, stdlib_topics (no files needed), mnist, fashion_mnist, cifar10, cifar100 or svhn.

    Or package.module:function of your own, which takes no arguments and returns a ticketlab.Task.
    """
    model: str = "mlp_100_50"
    """Architecture: lenet_300_100, conv_2, resnet_20, vgg_16, vit_tiny, ... (models.NAMES), resnet_20_w8 and so on.

    Or package.module:function of your own, which takes no arguments and returns a torch.nn.Module, drawn anew.
    """
    levels: int = 8
    """Prunings after the dense level 0; 1 is one-shot pruning. A stored run can be extended."""
    prune_fraction: float = 0.2
    """Share of the live weights that each level prunes."""
    scope: Scope = "global"
    """Reach of the threshold: global, one for the network; layer, each layer at its own rate."""
    conv_fraction: float | None = None
    """Rate of convolutions under layer scope; None: the same."""
    output_fraction: float | None = None
    """Rate of the output layer under layer scope; None: half."""
    criterion: str = "magnitude"
    """Score that weights are kept by: magnitude, random, obd_gauss_newton, snip, movement, ... (engine.criteria).

    Scores are taken at the end of each level's training, in as many rounds per level as the criterion is defined with.
    snip, grasp and synflow are thereby not the methods of their papers, which prune at initialisation: those are in
    the analysis pruning_criteria.
    """
    prunable: tuple[str, ...] = ()
    """Names of parameters to prune, with wildcards; empty: linear, convolution, recurrent and attention weights."""
    score_examples: int = 1000
    """Training examples that criteria of gradients see; all where there are fewer."""
    treatments: tuple[str, ...] = ("ticket", "reinit")
    """Networks trained side by side at every level: ticket, reinit, random_mask, sibling, ... (engine.treatments)."""
    init_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial weights; one network per seed and treatment."""
    order_seeds: tuple[int, ...] | None = None
    """Seeds of the batch orders, one per init seed; None: the same numbers (the streams are apart)."""
    rewind_step: int = 0
    """Step k whose weights the tickets start from."""
    retraining: str = "rewind"
    """Way of a ticket to the next level: rewind, lr_rewind or fine_tune."""
    snapshot_steps: tuple[int, ...] = ()
    """Further steps at which the dense networks are stored."""
    recipe: Recipe = field(default_factory=Recipe)
    """Training of each network."""
    validation_size: int | None = None
    """Training examples held out for early stopping; None: the task's default."""
    split_seed: int = 0
    """Seed of the split between training and validation."""
    dtype: Dtype = "float32"
    """Number format of weights and inputs."""

    def _repr_html_(self) -> str:
        return shown.table("ImpConfig", in_words(self))

    def __post_init__(self) -> None:
        check_fields(self)
        recipe = self.recipe
        named = [
            ("scope", self.scope, Scope),
            ("retraining", self.retraining, RETRAINING),
            ("dtype", self.dtype, Dtype),
        ]
        for kind, given, known in named:
            names = tuple(known) if isinstance(known, dict) else get_args(known)
            if given not in names:
                raise Refused(nearest(kind, given, names))
        slips = [("criterion", self.criterion, tuple(CRITERIA))]
        slips += [("treatment", treatment, tuple(TREATMENTS)) for treatment in self.treatments]
        for kind, given, known in slips:  # others may be a user's own: a study knows
            if given not in known and get_close_matches(given, known, n=1, cutoff=0.85):
                raise Refused(nearest(kind, given, known))
        if "ticket" not in self.treatments or len(set(self.treatments)) < len(self.treatments):
            raise Refused(f"treatments must contain 'ticket' and no name twice: got {self.treatments}.")
        frozen = [name for name in self.treatments if name in TREATMENTS and TREATMENTS[name].frozen]
        if frozen and recipe.weight_decay:
            raise Refused(f"weight decay would move the pruned weights of {frozen}: set it to 0, or leave them out.")
        if recipe.precision != "float32" and self.dtype != "float32":
            raise Refused(f"precision {recipe.precision!r} is for float32 weights: dtype is {self.dtype}. Change one.")
        if self.score_examples < 1:
            raise Refused(f"score_examples must be at least 1: got {self.score_examples}.")
        if self.levels < 0:
            raise Refused(f"levels must be at least 0: got {self.levels}.")
        for name in ("prune_fraction", "conv_fraction", "output_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise Refused(f"{name} must lie in (0, 1): got {value}.")
        if self.scope == "global" and (self.conv_fraction is not None or self.output_fraction is not None):
            raise Refused("conv_fraction and output_fraction need scope 'layer': a global threshold has one rate.")
        if not self.init_seeds or len(set(self.init_seeds)) < len(self.init_seeds):
            raise Refused(f"init_seeds must be one or more different seeds: got {self.init_seeds}.")
        if not all(0 <= seed < 2**32 for seed in (*self.init_seeds, *(self.order_seeds or ()))):
            raise Refused(f"seeds must lie in [0, 2^32): got {self.init_seeds}, {self.order_seeds}.")
        if self.order_seeds is not None and len(self.order_seeds) != len(self.init_seeds):
            raise Refused(f"order_seeds must be one for each of {self.init_seeds}: got {self.order_seeds}.")
        if not 0 <= self.rewind_step < recipe.steps:
            raise Refused(f"rewind_step must lie in [0, {recipe.steps}), before training ends: got {self.rewind_step}.")
        if any(not 0 <= s <= recipe.steps for s in self.snapshot_steps):
            raise Refused(f"snapshot_steps must lie in [0, {recipe.steps}]: got {self.snapshot_steps}.")


LATER_FIELDS = ("score_examples", "retraining", "prunable")
"""Fields that came after runs were stored: at their default they are not part of what names a run."""

LATER_RECIPE_FIELDS = ("decay_all", "label_smoothing", "clip_norm", "precision")
"""The same of a recipe."""


def described(config: ImpConfig) -> dict[str, Any]:
    """What of a config names a run and is stored: not ``levels``, so that a run can be extended.

    Of an optimizer or schedule of a user's own it is the name; what it does is told beside (`engine.identity`).
    """
    told = {n: v for n, v in _told(config, LATER_FIELDS).items() if n != "levels"}
    recipe = _told(config.recipe, LATER_RECIPE_FIELDS)
    return told | {"recipe": {n: OWN + own_name(v) if callable(v) else v for n, v in recipe.items()}}


def in_words(config: ImpConfig) -> dict[str, str]:
    """A study in a few lines: what is trained, how, and how it is pruned."""
    recipe = config.recipe
    optimizer, schedule = (own_name(v) if callable(v) else v for v in (recipe.optimizer, recipe.schedule))
    return {
        "trained": f"{config.model} on {config.task}, {config.dtype}",
        "recipe": f"{recipe.steps} steps of {optimizer} at {recipe.learning_rate:g} ({schedule}), "
        f"batches of {recipe.batch_size}",
        "pruned": f"{config.levels} times {100 * config.prune_fraction:g} % of the live weights, {config.scope}, "
        f"by {config.criterion}",
        "retrained": f"{config.retraining}, k = {config.rewind_step}",
        "treatments": ", ".join(config.treatments),
        "init seeds": ", ".join(map(str, config.init_seeds)),
    }


def _told(config: ImpConfig | Recipe, later: tuple[str, ...]) -> dict[str, Any]:
    values = {f.name: (getattr(config, f.name), f.default) for f in fields(config)}
    return {n: value for n, (value, default) in values.items() if n not in later or value != default}


def from_json(stored: Mapping[str, Any]) -> ImpConfig:
    """The config that `described` and JSON made of it; lists are tuples again.

    Raises:
        Refused: Fields that this version does not know, or lacks.
    """
    try:
        values = {k: _read(v) for k, v in stored.items()}
        recipe = {k: _read(v) for k, v in values.pop("recipe").items()}
        return ImpConfig(**values, recipe=Recipe(**recipe))
    except (TypeError, KeyError, AttributeError) as error:
        raise Refused(
            f"a stored config must have the fields of this version of ticketlab: {error}. Read it with the version "
            "that wrote it; config.json names it."
        ) from error


def _read(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(OWN):
        return Elsewhere(value.removeprefix(OWN))
    return tuple(value) if isinstance(value, list) else value
