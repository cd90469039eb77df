"""What a resumed run does with a key whose value has changed since its checkpoint: one table for every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Effect = Literal["applied", "refused", "rows", "base", "free"]
"""What a changed value does.

``applied``: it is used from the next step on, and logged. ``refused``: an error names the key. ``rows``: refused where
the rows of a step differ, else applied. ``base``: refused where the files hold other weights, else applied. ``free``:
it changes nothing that is trained, and is used without a word.
"""

_ROWS = "the rows of a step would differ"
_MODEL = "the weights were trained in another model"
_BASE = "adapters fit the weights they were trained on and no others"
_SHAPE = "the trained adapters have another shape or scale"
_START = "the frozen weights under the adapters would differ"
_STATE = "its state belongs to another optimizer"
_RECIPE = "the checkpoint holds what another recipe trained"


@dataclass(frozen=True)
class Rule:
    """What a change of one key does.

    Attributes:
        why: the reason of a refusal.
        can_be_allowed: whether ``checkpoint.allow_changes`` lifts the refusal.
        is_trained: whether an applied value changes the weights, so that it is pointless in a run without steps left.
    """

    effect: Effect
    why: str = ""
    can_be_allowed: bool = True
    is_trained: bool = False


FREE = Rule("free")
APPLIED = Rule("applied")
TRAINED = Rule("applied", is_trained=True)
ROWS = Rule("rows", _ROWS)
OTHER_ROWS = Rule("refused", _ROWS)
OTHER_MODEL = Rule("refused", _MODEL)
OTHER_BASE = Rule("base", _MODEL)
OTHER_SHAPE = Rule("refused", _SHAPE, can_be_allowed=False)

_ROW_KEYS = (
    "path", "name", "revision", "split", "format", "limit", "on_bad_row", "max_length", "truncation", "supervise",
    "chat_template", "streaming", "buffer_rows", "temperature",
)  # fmt: skip
_COLUMNS = (
    "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "tools", "text",
    "label", "chosen", "rejected",
)  # fmt: skip

RULES: dict[str, Rule] = {
    "recipe._target_": FREE,  # the name says which recipe it is; earlier versions named another function
    "recipe.name": Rule("refused", _RECIPE, can_be_allowed=False),
    "recipe.evaluations": FREE,
    "recipe.packs": FREE,
    "output_dir": FREE,
    "dist_env.backend": FREE,
    "dist_env.timeout_minutes": FREE,
    "dist_env.init_timeout_minutes": FREE,
    "rng.seed": OTHER_ROWS,
    "rng.deterministic": APPLIED,
    "step_scheduler.global_batch_size": OTHER_ROWS,
    "step_scheduler.local_batch_size": APPLIED,
    "step_scheduler.num_epochs": APPLIED,
    "step_scheduler.max_steps": APPLIED,
    "step_scheduler.val_every_steps": APPLIED,
    "step_scheduler.ckpt_every_steps": APPLIED,
    "step_scheduler.log_every_steps": APPLIED,
    "dataloader.num_workers": FREE,
    "dataloader.drop_last": OTHER_ROWS,
    "dataloader.sort_within_step": APPLIED,
    "dataloader.length_grouped": OTHER_ROWS,
    "dataloader.max_tokens_per_batch": APPLIED,
    "packing.enabled": ROWS,
    "packing.max_length": ROWS,
    "data_checks": FREE,
    "clip_grad_norm.max_norm": TRAINED,
    "on_non_finite": APPLIED,
    "checkpoint.*": FREE,
    "export.*": FREE,
    "model._target_": OTHER_MODEL,
    "model.pretrained_model_name_or_path": OTHER_BASE,
    "model.revision": OTHER_BASE,
    "model.tokenizer_name_or_path": ROWS,
    "model.config.*": OTHER_MODEL,
    "model.dtype": OTHER_MODEL,
    "model.attn_implementation": APPLIED,
    "model.trust_remote_code": FREE,
    "model.resize_embeddings": OTHER_MODEL,
    "peft": OTHER_SHAPE,
    "peft._target_": OTHER_SHAPE,
    "peft.rank": OTHER_SHAPE,
    "peft.alpha": OTHER_SHAPE,
    "peft.target_modules": OTHER_SHAPE,
    "peft.use_rslora": OTHER_SHAPE,
    "peft.use_dora": OTHER_SHAPE,
    "peft.modules_to_save": OTHER_SHAPE,
    "peft.target_parameters": OTHER_SHAPE,
    "peft.init_lora_weights": Rule("refused", _START, can_be_allowed=False),
    "peft.init_from": FREE,  # the checkpoint's adapters replace those that it brings
    "peft.lr_ratio": TRAINED,
    "peft.quantization": Rule("refused", _START, can_be_allowed=False),
    "peft.double_quantization": Rule("refused", _START, can_be_allowed=False),
    "peft.compute_dtype": APPLIED,
    "peft.dropout": TRAINED,
    "dataset._target_": ROWS,
    "dataset.num_proc": FREE,
    "dataset.validation_share": ROWS,
    "dataset.sources.*": ROWS,
    "dataset.chat_template_kwargs.*": ROWS,
    **{f"dataset.{key}": ROWS for key in _ROW_KEYS},
    **{f"dataset.columns.{key}": ROWS for key in _COLUMNS},
    "validation_dataset": APPLIED,
    "validation_dataset.num_proc": FREE,
    "validation_dataset.*": APPLIED,
    "evaluation": APPLIED,
    "evaluation.*": APPLIED,
    "distributed._target_": APPLIED,
    "distributed.defer_grad_sync": APPLIED,
    "distributed.mixed_precision": APPLIED,
    "distributed.dp_replicate_size": APPLIED,
    "distributed.tp_size": APPLIED,
    "distributed.sequence_parallel": APPLIED,
    "distributed.zero_stage": APPLIED,
    "distributed.shard_optimizer_over_replicas": APPLIED,
    "distributed.reshard_after_forward": FREE,
    "distributed.num_prefetched_layers": FREE,
    "distributed.cpu_offload": APPLIED,
    "distributed.activation_checkpointing": APPLIED,
    "distributed.activation_offload": FREE,
    "optimizer._target_": Rule("refused", _STATE, can_be_allowed=False),
    "optimizer.lr": TRAINED,
    "optimizer.betas": TRAINED,
    "optimizer.eps": TRAINED,
    "optimizer.weight_decay": TRAINED,
    "optimizer.momentum": TRAINED,
    "optimizer.beta2_decay": TRAINED,
    "lr_scheduler._target_": TRAINED,
    "lr_scheduler.warmup_ratio": TRAINED,
    "lr_scheduler.warmup_steps": TRAINED,
    "lr_scheduler.min_lr_ratio": TRAINED,
    "loss_fn._target_": TRAINED,
    "loss_fn.label_smoothing": TRAINED,
    "loss_fn.z_loss": TRAINED,
    "loss_fn.chunk_size": FREE,
    "logger.*": FREE,
    "launch.*": FREE,
}
"""The rule of every key. ``a.b.*`` means all keys below ``a.b``, which users may name."""

_OWN_KEYS = {
    "model": OTHER_MODEL,
    "peft": OTHER_SHAPE,
    "recipe": TRAINED,
    "dataset": ROWS,
    "distributed": APPLIED,
    "optimizer": TRAINED,
    "lr_scheduler": TRAINED,
    "loss_fn": TRAINED,
}
"""The rules of further keys, which a target of the user's own may have."""


@dataclass(frozen=True)
class Change:
    """A key whose value is not what it was when the checkpoint was made."""

    key: str
    old: Any
    new: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.key} is now {_shown(self.new)}, and was {_shown(self.old)}"


@dataclass
class Verdict:
    """What the changes since a checkpoint mean.

    Attributes:
        refused: a message for each change that nothing allows.
        unless_allowed: a message for each change that ``checkpoint.allow_changes`` allows.
        applied: the changes that take effect from the next step on, and are to be logged.
    """

    refused: list[str] = field(default_factory=list)
    unless_allowed: list[str] = field(default_factory=list)
    applied: list[Change] = field(default_factory=list)

    def pointless(self) -> list[Change]:
        """Return the changes that a run without steps left would not use."""
        return [change for change in self.applied if change.rule.is_trained]


def judge(saved: Mapping[str, Any], *, config: dict[str, Any], facts: Mapping[str, Any], folder: Any) -> Verdict:
    """Compare the configuration and the facts of a run with those that its checkpoint was made with.

    Args:
        saved: what the checkpoint notes: ``config``, which older ones lack, and the facts.
        config: the configuration now, as plain data with secrets masked.
        facts: ``dataset fingerprint`` and others that no key shows; of the base model, ``base weights``.
    """
    verdict = Verdict()
    before = saved.get("config") or _nested({key: saved[key] for key in RULES if key in saved})
    is_stream = bool(config["dataset"].get("streaming"))
    differs = {name for name, now in facts.items() if name in saved and saved[name] != now}
    explained: set[str] = set()
    for change in changes(before, json.loads(json.dumps(config))):
        effect = change.rule.effect
        fact = {"rows": "dataset fingerprint", "base": "base weights"}.get(effect)
        if fact is not None:
            is_known = fact in facts and fact in saved and not (is_stream and effect == "rows")
            effect = "refused" if fact in differs or not is_known else "applied"
            explained.add(fact)
        if effect == "applied":
            verdict.applied.append(change)
        elif effect == "refused":
            explained |= {"dataset fingerprint"} if change.rule.why == _ROWS else set()
            _refuse(verdict, change, config=config, folder=folder)
    for name in sorted(differs - explained):
        rule = OTHER_BASE if name == "base weights" else OTHER_ROWS
        _refuse(verdict, Change(name, saved[name], facts[name], rule), config=config, folder=folder)
    return verdict


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Yield every key whose values differ.

    A key that one side lacks is a change only where users name the keys, or where its whole section comes or goes:
    else it is one that another version of automodel, or another option of the group, has in addition.
    """
    flat_old, flat_new = _flat(old), _flat(new)
    for key in sorted(flat_old | flat_new):
        one, other = flat_old.get(key, _MISSING), flat_new.get(key, _MISSING)
        if one == other or key.endswith("_partial_"):
            continue
        rule = rule_of(key)
        if _MISSING in (one, other):
            section = key.partition(".")[0]
            is_whole = not old.get(section) or not new.get(section)
            if is_whole and section in old and section in new:
                if key.endswith("._target_"):
                    yield Change(section, old[section], new[section], rule_of(section))
                continue
            if not _is_named_by_user(key):
                continue
            one, other = (None if value is _MISSING else value for value in (one, other))
        yield Change(key, one, other, rule)


def rule_of(key: str) -> Rule:
    """Return the rule of a key: its own, that of the free table it is in, or that of its section.

    Raises:
        KeyError: the table has none.
    """
    if key in RULES:
        return RULES[key]
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        table = ".".join(parts[:length]) + ".*"
        if table in RULES:
            return RULES[table]
    return _OWN_KEYS[parts[0]]


_MISSING = object()


def _is_named_by_user(key: str) -> bool:
    tables = (rule.removesuffix("*") for rule in RULES if rule.endswith(".*") and rule.count(".") > 1)
    return key.startswith(tuple(tables))


def _refuse(verdict: Verdict, change: Change, *, config: dict[str, Any], folder: Any) -> None:
    is_base_of_adapters = change.rule is OTHER_BASE and bool(config.get("peft"))
    can_be_allowed = change.rule.can_be_allowed and not is_base_of_adapters
    why = _BASE if is_base_of_adapters else change.rule.why
    choices = ["put it back", "begin a new run with another output_dir"]
    choices += ["set checkpoint.allow_changes=true"] if can_be_allowed else []
    text = (
        f"{change.key} is {_shown(change.new)}, but the checkpoint {folder} was made with {_shown(change.old)}: {why}; "
        f"{', '.join(choices[:-1])}, or {choices[-1]}"
    )
    (verdict.unless_allowed if can_be_allowed else verdict.refused).append(text)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree or None if isinstance(tree, dict) else tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("_target_", value)).rpartition(".")[2]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
