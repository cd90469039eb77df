"""A character-level tokenizer built in code, for the small demonstration model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
UNK_TOKEN = "<unk>"

CHAR_MODEL_MAX_LENGTH = 512
"""How many characters a model that uses this tokenizer is expected to read at most."""

# Every turn but the assistant's is closed by a newline alone; the assistant's is closed by
# the end token, so that a model trained on answers learns where to stop generating.
CHAR_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "A: {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ ('S: ' if message['role'] == 'system' else 'Q: ') + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def char_vocabulary() -> dict[str, int]:
    """Map the special tokens, the newline and printable ASCII to ids, in that order."""
    printable = [chr(code) for code in range(ord(" "), ord("~") + 1)]
    tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, "\n", *printable]
    return {token: index for index, token in enumerate(tokens)}


def build_char_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer in which every printable ASCII character and the newline is a token.

    Nothing is normalised, stripped or cleaned up, so decoding gives back any such text
    exactly. With ``add_special_tokens`` only the beginning token is put in front: the end
    token belongs to the answer, which whoever builds the training example must close.
    The text of a special token (``</s>``) is read as that token, not as its characters.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = char_vocabulary()
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    # Without a decoder, tokens are joined by spaces.
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A $B:1",
        special_tokens=[(BOS_TOKEN, vocabulary[BOS_TOKEN])],
    )

    def special(token: str) -> AddedToken:
        return AddedToken(token, normalized=False, special=True)

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special(PAD_TOKEN),
        bos_token=special(BOS_TOKEN),
        eos_token=special(EOS_TOKEN),
        unk_token=special(UNK_TOKEN),
        padding_side="right",
        model_max_length=CHAR_MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAR_CHAT_TEMPLATE,
    )
