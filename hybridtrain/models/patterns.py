"""Shell-style patterns of parameter and module names (model.freeze, optim.no_decay, optim.rules,
precision.monitor_modules). No torch.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from hybridtrain.config.schema import AdaptersConfig, OptimConfig
from hybridtrain.errors import refusal

_ADAPTER = ".lora_"
_HEADS = ("score.", "classifier.", "pre_classifier.", "qa_outputs.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter name matches one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter (models/adapters.py)."""
    return _ADAPTER in name


def is_classes_head(name: str) -> bool:
    """Whether a parameter is one of a classifier's head, trained whole beside adapters, as by peft."""
    return name.startswith(_HEADS)


def is_frozen(name: str, *, freeze: Sequence[str], adapters: AdaptersConfig) -> bool:
    """Whether a parameter is not trained: one that model.freeze matches; with adapters, all of the model's
    own but the head of a classifier and adapters.modules_to_save.
    """
    if adapters.kind == "none":
        return matches(name, freeze)
    saved = is_classes_head(name) or matches(name.rpartition(".")[0], adapters.modules_to_save)
    return not (saved or is_adapter(name))


def check(
    names: Sequence[str], *, freeze: Sequence[str], optim: OptimConfig, adapters: AdaptersConfig
) -> None:
    """Refuse patterns that match no parameter of the whole model, those that freeze all, and rules that come
    too late (raises UserError).
    """
    for pattern in freeze:
        check_one("model.freeze", pattern, names, what="parameter")
    if freeze and all(matches(name, freeze) for name in names):
        words = "it freezes all parameters, so nothing would be trained"
        raise refusal(
            "model.freeze",
            list(freeze),
            words,
            allowed="patterns that do not match all",
            instead="model.freeze=['model.embed_tokens.*']",
        )
    for pattern in optim.no_decay:
        if pattern not in OptimConfig().no_decay:  # the defaults are for models with and without biases
            check_one("optim.no_decay", pattern, names, what="parameter")
    left = {name for name in names if not is_frozen(name, freeze=freeze, adapters=adapters)}
    for number, rule in enumerate(optim.rules):
        field, pattern = f"optim.rules[{number}]", rule["match"]
        check_one(field, pattern, names, what="parameter")
        now = {name for name in left if not matches(name, [pattern])}
        if now == left:
            raise refusal(
                field,
                pattern,
                "all that it matches is frozen, or matched by rules before it, and the first match counts",
                allowed="rules from the particular to the general",
                instead="this rule before the others",
            )
        left = now


def check_one(field: str, pattern: str, names: Sequence[str], *, what: str) -> None:
    """Refuse a pattern that matches none of the names of parameters or modules (`what`); raises UserError."""
    if any(fnmatch.fnmatchcase(name, pattern) for name in names):
        return
    kinds = sorted(
        {".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names}
    )
    inside = [kind for kind in kinds if pattern.strip("*.") and pattern.strip("*.") in kind]
    word = max(pattern.replace("*", ".").split("."), key=len)
    parts = difflib.get_close_matches(
        word, {part for kind in kinds for part in kind.split(".")}, n=1, cutoff=0.6
    )
    near = (
        inside
        or [kind for kind in kinds if parts and parts[0] in kind.split(".")]
        or difflib.get_close_matches(pattern, kinds, n=1, cutoff=0.3)
        or kinds
    )[0]
    # What layers share is named without the path to the layers.
    short = dict.fromkeys(f"*.{kind.rpartition('.*.')[2]}" if ".*." in kind else kind for kind in kinds)
    tied = (
        " (a tied head is model.embed_tokens.weight)"
        if what == "parameter" and "lm_head" in pattern and "lm_head.weight" not in names
        else ""
    )
    words = f"it matches no {what} of the model{tied}; patterns must match whole names"
    raise refusal(
        field,
        [pattern],
        words,
        allowed=", ".join(short),
        instead=f"match: '{near}'" if field.endswith("]") else f"{field}=['{near}']",
    )
