"""Models and tokenizers of transformers: pretrained, or fresh from a configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from automodel.logs import get_logger
from automodel.models.checks import attention_problems, fresh_model_problems, model_problems, tokenizer_problems
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from automodel.config import Config

log = get_logger(__name__)

WeightDtype = Literal["auto", "float32", "bfloat16"]
"""``auto``: what the run makes of it (``distributed/precision.py``); float32 where nothing else is said."""

_NUM_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
"""Of each weight file, spread evenly: 1 MiB, in which any two trainings of a model differ."""
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class HFModel:
    """A pretrained model from a folder or the hub; what ``model=hf`` configures."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    dtype: WeightDtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    resize_embeddings: bool = False

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from model_problems("model.pretrained_model_name_or_path", section.get("pretrained_model_name_or_path"))
        yield from attention_problems(section)

    @property
    def name(self) -> str:
        return self.pretrained_model_name_or_path

    def max_length(self) -> int | None:
        """Return the most tokens that the model can take, or None where its configuration does not say."""
        return getattr(self.config().get_text_config(), "max_position_embeddings", None)

    def download(self) -> None:
        """Bring the weights of a hub id into the local cache; nothing happens where a folder is named."""
        try:
            self.weights_folder()
        except (OSError, ValueError) as error:
            path = self.pretrained_model_name_or_path
            raise UserError(f"model.pretrained_model_name_or_path={path}: {_first_line(error)}") from error

    def weights_folder(self) -> Path:
        """Return the folder named, or that of a hub id in the local cache, into which missing weights are brought."""
        from huggingface_hub import snapshot_download

        path = self.pretrained_model_name_or_path
        if Path(path).is_dir():
            return Path(path)
        return Path(snapshot_download(path, revision=self.revision, allow_patterns=_WEIGHTS, ignore_patterns="*/*"))

    def weights_fingerprint(self) -> str:
        """Return a hash that tells other weights apart: of samples from every file, since whole ones take minutes."""
        digest, folder = hashlib.sha256(), self.weights_folder()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(_NUM_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the weights."""
        return _load_tokenizer(
            self.pretrained_model_name_or_path, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    def build(
        self, tokenizer: PreTrainedTokenizerBase, *, task: Any, quantization_config: Any = None
    ) -> PreTrainedModel:
        """Load the weights on the CPU, or on this rank's device if they are quantized.

        Args:
            task: the Task that says which class of transformers loads them.
            quantization_config: transformers' own, or None.

        Raises:
            UserError: nothing loadable is there, or a weight of the checkpoint or of the model has no partner
                (a new classification head excepted).
        """
        options = self._options()
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        try:
            model, report = task.auto_class().from_pretrained(
                self.pretrained_model_name_or_path,
                config=_configured(self.config(), task, tokenizer),
                dtype=torch_dtype(self.dtype),
                attn_implementation=self.attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"model.pretrained_model_name_or_path={self.pretrained_model_name_or_path}: {_first_line(error)}"
            ) from error
        require_complete(self.pretrained_model_name_or_path, report, has_new_head=task.has_new_head, model=model)
        if self.resize_embeddings:
            _enlarge_embeddings(model, len(tokenizer))
        return model

    def build_unfilled(self, tokenizer: PreTrainedTokenizerBase, *, task: Any) -> PreTrainedModel:
        """Build the same model from its configuration alone; its weights are still to be put in.

        Raises:
            UserError: no configuration can be loaded.
        """
        from transformers import GenerationConfig

        config = _configured(self.config(), task, tokenizer)
        if self.resize_embeddings:
            text_config = config.get_text_config()
            text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
        try:
            model = task.auto_class().from_config(
                config,
                dtype=torch_dtype(self.dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"model.pretrained_model_name_or_path={self.pretrained_model_name_or_path}: {_first_line(error)}"
            ) from error
        if model.can_generate():
            with suppress(OSError):  # it has none of its own
                model.generation_config = GenerationConfig.from_pretrained(
                    self.pretrained_model_name_or_path, revision=self.revision
                )
        return model

    def config(self) -> PreTrainedConfig:
        """Load the configuration.

        Raises:
            UserError: none can be loaded.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.pretrained_model_name_or_path, **self._options())
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.pretrained_model_name_or_path={self.pretrained_model_name_or_path}: {_first_line(error)}"
            ) from error

    def _options(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class ScratchModel:
    """A model with fresh weights; what ``model=scratch`` configures."""

    config: dict[str, Any] = field(default_factory=dict)
    tokenizer_name_or_path: str = ""
    dtype: WeightDtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from fresh_model_problems(cfg)
        yield from tokenizer_problems("model.tokenizer_name_or_path", section.get("tokenizer_name_or_path"))
        yield from attention_problems(section)

    @property
    def name(self) -> str:
        return f"fresh {self.config['model_type']}"

    def max_length(self) -> int | None:
        """Return the most tokens that the model can take, or None where its configuration does not say."""
        return self.config.get("max_position_embeddings")

    def download(self) -> None:
        """Do nothing: there are no weights to fetch."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer whose vocabulary the model gets."""
        return _load_tokenizer(self.tokenizer_name_or_path, revision=None, trust_remote_code=self.trust_remote_code)

    def build(self, tokenizer: PreTrainedTokenizerBase, *, task: Any) -> PreTrainedModel:
        """Draw the weights from torch's global generator."""
        from transformers import AutoConfig

        values = dict(self.config)
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **{"vocab_size": len(tokenizer)} | values)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"model.config: {_first_line(error)}") from error
        return build_fresh(
            config,
            tokenizer,
            task=task,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
        )


def _enlarge_embeddings(model: PreTrainedModel, num_rows: int) -> None:
    """Give a model ``num_rows`` rows of its embedding, and of its output, if it has fewer; new ones are their mean.

    The mean, and no noise around it, so that each load of the model gives the same rows.
    """
    import torch

    num_own = model.get_input_embeddings().weight.shape[0]
    if num_rows <= num_own:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model.resize_token_embeddings(num_rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for weight in () if layer is None else layer.parameters():
                weight[num_own:] = weight[:num_own].float().mean(dim=0).to(weight.dtype)


def build_fresh(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Any,
    dtype: WeightDtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Build a model of ``config`` with fresh weights drawn from torch's global generator."""
    for name in ("bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.pad_token_id = pad_token_id(tokenizer)
    return task.auto_class().from_config(
        _configured(config, task, tokenizer),
        dtype=torch_dtype(dtype),
        attn_implementation=attn_implementation,
    )


def torch_dtype(dtype: WeightDtype) -> torch.dtype:
    """Return the type in which weights are built."""
    import torch

    return torch.float32 if dtype == "auto" else getattr(torch, dtype)


def held_in(source: Any, dtype: torch.dtype) -> Any:
    """Return ``source`` such that it builds weights of ``dtype``; a model of the user's own builds as it likes."""
    if is_dataclass(source) and hasattr(source, "dtype"):
        return replace(source, dtype=str(dtype).removeprefix("torch."))
    return source


def build_unfilled(source: Any, tokenizer: PreTrainedTokenizerBase, *, task: Any, device: str) -> PreTrainedModel:
    """Build the model of ``source`` on ``device`` without loading weights; on ``meta`` it takes no memory.

    Its weights mean nothing; what is computed from the configuration (rotary frequencies) is right on ``cpu``.

    Args:
        source: what the ``model`` section builds.
    """
    import torch
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        build = source.build_unfilled if isinstance(source, HFModel) else source.build
        model = build(tokenizer, task=task)
    model.tie_weights()  # which is left out along with the drawing of weights
    return model


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Make generation stop at ``ids`` too, here and where the export is loaded.

    A base model's own settings name the end of a document, not that of a turn.
    """
    settings = model.generation_config
    given = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    own = [given] if isinstance(given, int) else list(given or ())
    new = sorted(set(ids) - set(own))
    if not new:
        return
    settings.eos_token_id = [*own, *new]
    names = [" ".join(tokenizer.convert_ids_to_tokens(each)) for each in (new, own) if each]
    log.info(
        "generation stops at %s, which training teaches as the end of an answer%s; generation_config.json says so",
        names[0], f", as well as at {names[1]}" if own else "",
    )  # fmt: skip


def head_labels(source: Any) -> tuple[str, ...]:
    """Return the labels, by index, of the classifier's head that a pretrained model brings; empty where it has none.

    Args:
        source: what the ``model`` section builds.
    """
    if not isinstance(source, HFModel):
        return ()
    config = source.config()
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return tuple(config.id2label[index] for index in sorted(config.id2label)) if is_classifier else ()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills batches up; any id serves, since masks come from positions."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def _load_tokenizer(path: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the tokenizer of {path} cannot be loaded: {_first_line(error)}") from error


def _configured(config: PreTrainedConfig, task: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    task.configure(config, tokenizer)
    return config


def require_complete(path: str, report: dict[str, Any], *, has_new_head: bool, model: PreTrainedModel) -> None:
    """Refuse weights without a partner, by what transformers reports of loading them (a new head's excepted).

    Raises:
        UserError: weights are missing from the files, unknown to the model, or of another shape.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    misshaped = {name: shapes for name, *shapes in report["mismatched_keys"]}
    if has_new_head:
        body = model.base_model_prefix + "."
        missing = {key for key in missing if key.startswith(body)}
        unexpected = {key for key in unexpected if key.startswith(body)}
        misshaped = {key: shapes for key, shapes in misshaped.items() if key.startswith(body)}
    problems = [
        f"model.pretrained_model_name_or_path={path}: {len(keys)} weights are {what}, such as {min(keys)}"
        for keys, what in ((missing, "missing from the checkpoint"), (unexpected, "unknown to the model"))
        if keys
    ]
    if misshaped:
        held, needed = map(list, misshaped[min(misshaped)])
        problems.append(
            f"model.pretrained_model_name_or_path={path}: {len(misshaped)} weights are of another shape, such as "
            f"{min(misshaped)}: {held} in the checkpoint, {needed} in the model"
        )
    if problems:
        raise UserError(*problems)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
