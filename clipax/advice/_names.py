"""Which name means what: the columns of norms, losses, steps that trainers write.

| trainer | norm before its clip | loss |
|---|---|---|
| Hugging Face Trainer, TRL, torchtitan | `grad_norm`, `train/grad_norm` | `loss`, `train/loss` |
| Lightning | `grad_2.0_norm_total` | `train_loss` |
| MaxText | `learning/raw_grad_norm`; `learning/grad_norm` is after its clip | `learning/loss` |
| Levanter | `grad/norm/total` | `train/loss` |
| OLMo-core | `optim/total grad norm` | `train/CE loss` |
| Composer | `l2_norm/grad/global` | `loss/train/total` |
| LeRobot | `grdn` | `loss` |
| Megatron | `grad norm` | `lm loss` |
| fairseq | `gnorm` | `loss` |
| llm.c, nanoGPT and their like | `norm` | `loss` |
| clipax | `raw_norm`, `norm_in`, `norm` beside `clipped_norm` | |

A Weights & Biases export puts the run before the name: `RUN - train/grad_norm`.
"""

import re
from collections.abc import Container

_RAW = re.compile(
    r"(.*_)?(raw|unclipped)_(grad(ient)?s?_)?norm|(.*_)?grad_norm_(before|pre)_?clip.*"
    r"|(.*_)?norm_in"
)
_TOTAL = re.compile(
    r"(.*_)?(grad(ient)?s?_(global_|l2_|[\d.]+_)?norm(_total|_global)?|gnorm|grdn)"
    r"|(.*_)?norm_grad_global"
)
_AFTER_CLIP = re.compile(
    r"(.*_)?clipped_(grad_)?norm|.*norm_(after|post)_?clip.*|learning_grad_norm"
)
_OWN = re.compile(r"(?P<before>(.*[^A-Za-z])?)norm(?P<after>(/all)?)")
_SUMMARIES = ("__min", "__max")
_LOSSES = (
    re.compile(r"(.*_)?(train|training|lm|learning|ce|total)_loss(_total)?|loss"),
    re.compile(r"loss_train(_total)?|(.*_)?loss"),
)
_NO_LOSS = re.compile(r".*(eval|valid|val_|test|scale).*")
_STEPS = (
    re.compile(r"(global_)?steps?|iter(ation)?s?"),
    re.compile(r"_step|(train|trainer)_(global_)?step"),
)


def plain(name: str) -> str:
    """A name in lower case, without a run before it, with `_` for all other separators."""
    return re.sub(r"[^a-z0-9.]+", "_", name.rsplit(" - ", 1)[-1].strip().lower())


def beside(name: str, field: str) -> str | None:
    """The name under which `clipax.metrics` gives another field; None if it gives no such norm."""
    own = _OWN.fullmatch(name)
    return f"{own['before']}{field}{own['after']}" if own and not is_after_clip(name) else None


def is_of_clipax(name: str) -> bool:
    """Whether this is a norm or a bound of `clipax.metrics`, or is named like one."""
    return beside(name.replace("max_norm", "norm"), "") is not None


def norm_rank(name: str, names: Container[str] = ()) -> int | None:
    """How surely a name is that of a global norm before a clip: 0 is surest; None is no norm.

    `names` are all names of the log.
    """
    if is_summary(name):
        return None
    if beside(name, "clipped_norm") in names:
        return 2
    name = plain(name)
    if _RAW.fullmatch(name):
        return 0
    if _AFTER_CLIP.fullmatch(name):
        return 4
    if _TOTAL.fullmatch(name):
        return 1
    if name == "norm":
        return 2
    return 3 if "grad" in name and "norm" in name else None


def is_after_clip(name: str) -> bool:
    """Whether the name says that the norm is that of the clipped gradient."""
    return _AFTER_CLIP.fullmatch(plain(name)) is not None


def loss_rank(name: str) -> int | None:
    """How surely a name is that of the loss in training."""
    name = plain(name)
    if _NO_LOSS.fullmatch(name):
        return None
    return next((rank for rank, form in enumerate(_LOSSES) if form.fullmatch(name)), None)


def step_rank(name: str) -> int | None:
    """How surely a name is that of the step."""
    name = plain(name)
    return next((rank for rank, form in enumerate(_STEPS) if form.fullmatch(name)), None)


def is_summary(name: str) -> bool:
    """Whether a column is Weights & Biases' smallest or largest value of a bucket."""
    return name.strip().lower().endswith(_SUMMARIES)
