"""Small tokenizers with the habits of sentencepiece: word marks, and special tokens that swallow white space."""

import string

TEXTS = [
    "Once upon a time there was a cat. Then it slept. Tell me a story about a cat.",
    "One? 1. Two? 2. It is 3. Bye. Thanks. A fish? I said: 1. user assistant model system",
    "the answer is that it was there and then it was not; what is the question",
] * 3
ALPHABET = [*string.ascii_letters, *string.digits, *string.punctuation, "\n", "▁"]
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")


def build(kind):
    """Return a tokenizer of one of ``KINDS``; a normalizer marks the words of ``legacy``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    options = {"vocab_size": 250, "special_tokens": ["<unk>"], "initial_alphabet": ALPHABET, "show_progress": False}
    if kind == "unigram_first":
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(**options)
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        decoder = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(decoder)
    else:
        scheme = "first" if kind == "unigram_first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(TEXTS, trainer)
    swallows = {"rstrip": True, "lstrip": True} if kind == "swallowing" else {}
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, **swallows) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


KINDS = ("unigram_first", "bpe_always", "legacy", "swallowing")
