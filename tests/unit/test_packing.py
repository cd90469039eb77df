"""Documents that share a row are computed as if each were alone, and few slots of a row stay empty."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from automodel.data.batches.collate import CausalLMCollator, PackedCollator
from automodel.data.batches.packing import PackedRows, pack
from automodel.losses.cross_entropy import CrossEntropy, forward_logits
from automodel.models.isolation import require_isolation
from automodel.types import UserError

# Of logits up to 24, whose float32 errors are 2.4e-5 for a document alone; the largest difference seen was 2.2e-5, and
# a leak makes whole units.
LOGITS = 5e-5


def simple_best_fit(lengths, max_length) -> list[int]:
    """Best fit decreasing by looking at every pack for every document; the filled slots of each pack."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= max_length]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += length
        else:
            fills.append(length)
    return fills


def fills_of(packs, lengths) -> list[int]:
    return [int(np.asarray(lengths)[documents].sum()) for documents in packs]


def token_lengths(tokenizer, shared_data, name) -> list[int]:
    """Lengths of prompt and answer together, with an end token."""
    texts = []
    for line in (shared_data / name).read_text().splitlines():
        row = json.loads(line)
        texts.append(
            f"{row['question']}\n{row['answer']}"
            if "gsm8k" in name
            else f"{row['context']}\n{row['question']}\n{row['answers']['text'][0]}"
        )
    return [min(2048, len(ids) + 1) for ids in tokenizer(texts, verbose=False)["input_ids"]]


@pytest.fixture(scope="module")
def tokenizers(shared_data, stories):
    from transformers import AutoTokenizer, GPT2TokenizerFast

    gpt2 = shared_data / "templates" / "tok_gpt2"
    return {
        "tok_gpt2": GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt")),
        "tok_minimind": AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind"),
        "stories260k": AutoTokenizer.from_pretrained(stories),
    }


@pytest.mark.parametrize("max_length", [1, 7, 64, 2048])
def test_packs_are_those_of_a_simple_best_fit_decreasing(max_length):
    generator = np.random.default_rng(max_length)
    for num_documents in (0, 1, 2, 50, 400):
        for longest in (max_length, max(1, max_length // 3), max(1, max_length // 20)):
            lengths = generator.integers(1, longest + 1, num_documents)
            packs = pack(lengths, max_length)
            assert sorted(packs.order.tolist()) == list(range(num_documents)), "every document once"
            assert sorted(fills_of(packs, lengths)) == sorted(simple_best_fit(lengths.tolist(), max_length))


@pytest.mark.parametrize("name", ["sft/gsm8k_train.jsonl", "qa/squad_train.jsonl"])
@pytest.mark.parametrize("tokenizer", ["tok_gpt2", "tok_minimind", "stories260k"])
def test_real_rows_need_no_more_packs_than_a_simple_best_fit_decreasing(tokenizers, shared_data, tokenizer, name):
    lengths = token_lengths(tokenizers[tokenizer], shared_data, name)
    packs = pack(np.array(lengths), 2048)
    fewest = -(-sum(lengths) // 2048)
    simple = len(simple_best_fit(lengths, 2048))
    print(f"{name} {tokenizer}: {len(packs)} packs (best fit {simple}, bound {fewest}), {packs.efficiency:.4f} filled")
    assert len(packs) == simple
    assert packs.efficiency == pytest.approx(sum(lengths) / (2048 * simple))


def test_equal_lengths_keep_their_order_and_packing_is_deterministic():
    packs = pack(np.array([3, 5, 3, 5, 3]), 8)
    assert sorted(map(sorted, (documents.tolist() for documents in packs))) == [[0, 1], [2, 3], [4]]
    again = pack(np.array([3, 5, 3, 5, 3]), 8)
    assert (packs.order == again.order).all() and (packs.offsets == again.offsets).all()
    assert packs.order.dtype == packs.offsets.dtype == np.int64
    assert packs[-1].tolist() == [4]
    with pytest.raises(IndexError):
        packs[3]


@pytest.mark.parametrize(("lengths", "place"), [([3, 9, 4], "document 1 has 9"), ([3, 4, 0], "document 2 has 0")])
def test_a_document_that_fits_no_pack_is_an_error(lengths, place):
    with pytest.raises(ValueError, match=place):
        pack(np.array(lengths), 8)


DOCUMENTS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 7, -100]},
    {"input_ids": [8, 9], "labels": [9, -100], "loss_weights": [0.5, 0.5]},
    {"input_ids": [4], "labels": [-100], "loss_weights": []},
]


def packed(documents, max_length) -> PackedRows:
    return PackedRows(documents, pack(np.array([len(row["input_ids"]) for row in documents]), max_length))


def test_a_packed_row_is_its_documents_one_after_another():
    rows = packed(DOCUMENTS, 5)
    assert list(rows) == [
        {
            "input_ids": [5, 6, 7, 8, 9],
            "labels": [-100, 7, -100, 9, -100],
            "position_ids": [0, 1, 2, 0, 1],
            "loss_weights": [1.0, 1.0, 1.0, 0.5, 0.5],
        },
        {"input_ids": [4], "labels": [-100], "position_ids": [0]},
    ]


def test_packed_batches_have_no_mask_and_a_padded_tail_of_its_own():
    batch = PackedCollator(pad_token_id=1, length_multiple=4)(list(packed(DOCUMENTS, 5)))
    assert batch.num_tokens == 6
    assert {name: batch[name].tolist() for name in batch} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]],
        "labels": [[-100, 7, -100, 9, -100, -100, -100, -100], [-100] * 8],
        "loss_weights": [[1, 1, 1, 0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
    }
    assert batch.loss_weights.dtype == torch.float32
    assert {batch[name].dtype for name in batch if name != "loss_weights"} == {torch.int64}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"])
def test_flash_attention_gets_one_row_with_its_borders(attention):
    batch = PackedCollator(pad_token_id=1, length_multiple=4, attention=attention)(list(packed(DOCUMENTS, 5)))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 8] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 0.5, 0.5, 1, 0, 0]]
    given = {}

    class Seen(nn.Module):
        def forward(self, **inputs):
            given.update(inputs)
            return type("Output", (), {"logits": torch.zeros(1, 8, 3)})

    forward_logits(Seen(), batch)
    assert given["cu_seq_lens_q"] is given["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert (given["max_length_q"], given["max_length_k"], given["use_cache"]) == (3, 3, False)
    assert given.keys() - {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} == {
        "input_ids", "position_ids", "use_cache",
    }  # fmt: skip


def test_flash_keywords_are_those_of_transformers_own_collator():
    from transformers import DataCollatorWithFlattening

    documents = [{"input_ids": row["input_ids"]} for row in DOCUMENTS]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    rows = [row | {"position_ids": range(len(row["input_ids"]))} for row in DOCUMENTS]
    ours = PackedCollator(0, attention="flash_attention_2")(rows)
    assert ours["cu_seq_lens_q"].tolist() == theirs["cu_seq_lens_q"].tolist() == theirs["cu_seq_lens_k"].tolist()
    assert ours["max_length_q"] == theirs["max_length_q"] == theirs["max_length_k"]
    assert ours["position_ids"].tolist() == theirs["position_ids"].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2"])
def test_no_rows_make_a_packed_dummy(attention):
    batch = PackedCollator(pad_token_id=3, length_multiple=2, attention=attention)([])
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1]]
    assert batch["labels"].tolist() == [[-100, -100]]
    assert batch.num_tokens == 0


def test_unpacked_batches_have_weights_only_where_an_example_has():
    batch = CausalLMCollator(0)(DOCUMENTS)
    assert batch["loss_weights"].tolist() == [[1, 1, 1], [0.5, 0.5, 0], [1, 0, 0]]
    assert "loss_weights" not in CausalLMCollator(0)([DOCUMENTS[0], DOCUMENTS[2]])


class Table(nn.Module):
    """Gives the same logits for a token wherever it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(10, 10)

    def forward(self, input_ids, use_cache, **_):
        return type("Output", (), {"logits": self.logits(input_ids)})


def test_the_weighted_loss_is_the_sum_of_weight_times_loss():
    torch.manual_seed(0)
    model = Table()
    batch = PackedCollator(0)(list(packed(DOCUMENTS, 5)))
    logs = F.log_softmax(model.logits.weight, dim=-1)
    by_hand = -1.0 * logs[6, 7] - 0.5 * logs[8, 9]
    torch.testing.assert_close(CrossEntropy()(model, batch), by_hand)
    torch.testing.assert_close(CrossEntropy()(model, CausalLMCollator(0)(DOCUMENTS)), by_hand)
    batch.loss_weights = None
    torch.testing.assert_close(CrossEntropy()(model, batch), -logs[6, 7] - logs[8, 9])


def load(stories, attention: str, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32, attn_implementation=attention, **options)
    return model.eval()


def real_documents(tokenizers, shared_data, num_documents) -> list[dict]:
    """Real rows, cut to uneven lengths, whose answers are supervised."""
    tokenizer, documents = tokenizers["stories260k"], []
    for number, line in enumerate((shared_data / "sft" / "gsm8k_train.jsonl").read_text().splitlines()[:num_documents]):
        row = json.loads(line)
        prompt = tokenizer(row["question"])["input_ids"][: 1 + (number * 5) % 23]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"][: (number * 7) % 31]
        labels = [*([-100] * len(prompt) + answer)[1:], -100]
        documents.append({"input_ids": prompt + answer, "labels": labels})
    return documents


def worst_logit(stories, documents, *, attention, rows_at_once=2, use_cache=False) -> float:
    """The largest difference of a packed document's logits to those of the document alone, by eager attention."""
    model, plain = load(stories, attention), load(stories, "eager")
    model.config.use_cache = use_cache
    rows, collate, worst = packed(documents, 96), PackedCollator(0, attention=attention), 0.0
    assert len(rows) >= 2
    for start in range(0, len(rows), rows_at_once):
        numbers = range(start, min(start + rows_at_once, len(rows)))
        batch = collate([rows[i] for i in numbers])
        lengths = torch.tensor([len(rows[i]["input_ids"]) for i in numbers])
        num_rows, width = batch["input_ids"].shape
        is_token = torch.arange(width) < (lengths if num_rows > 1 else lengths.sum(0, keepdim=True))[:, None]
        with torch.no_grad():
            got = forward_logits(model, batch)[is_token]
            alone = [
                plain(input_ids=torch.tensor([documents[number]["input_ids"]])).logits[0]
                for i in numbers
                for number in rows.packs[i]
            ]
        worst = max(worst, (got - torch.cat(alone)).abs().max().item())
    print(f"{attention}: {worst:.2g}")
    return worst


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_get_the_logits_they_get_alone(tokenizers, shared_data, stories, attention):
    documents = real_documents(tokenizers, shared_data, 24)
    assert worst_logit(stories, documents, attention=attention) < LOGITS


def test_a_configuration_that_asks_for_a_cache_does_not_mix_documents(tokenizers, shared_data, stories):
    documents = real_documents(tokenizers, shared_data, 12)
    assert worst_logit(stories, documents, attention="sdpa", use_cache=True) < LOGITS


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="flex attention needs a C++ compiler")
def test_flex_attention_keeps_documents_apart(tokenizers, shared_data, stories):
    documents = real_documents(tokenizers, shared_data, 8)
    # All packs at once: every shape is compiled anew.
    assert worst_logit(stories, documents, attention="flex_attention", rows_at_once=99) < LOGITS


def test_loss_and_gradients_of_a_packed_epoch_are_those_of_the_documents(tokenizers, shared_data, stories):
    documents = real_documents(tokenizers, shared_data, 24)
    num_supervised = sum(label != -100 for row in documents for label in row["labels"])
    plain, model = load(stories, "sdpa"), load(stories, "sdpa")
    expected = 0.0
    for row in documents:
        logits = plain(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        loss = F.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum") / num_supervised
        loss.backward()
        expected += loss.item()
    rows, got = packed(documents, 96), 0.0
    for start in range(0, len(rows), 2):
        batch = PackedCollator(0)([rows[i] for i in range(start, min(start + 2, len(rows)))])
        loss = CrossEntropy()(model, batch) / num_supervised
        loss.backward()
        got += loss.item()
    assert got == pytest.approx(expected, abs=1e-5)
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=0, atol=1e-5, msg=name)


def check(model, *, attention="sdpa", forward=forward_logits, vocab_size=48) -> None:
    require_isolation(
        model,
        collate=PackedCollator(0, attention=attention),
        forward=forward,
        vocab_size=vocab_size,
        device=torch.device("cpu"),
        autocast=nullcontext,
        attention=attention,
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_isolation_is_confirmed_and_the_mode_of_the_model_kept(stories, attention):
    model = load(stories, attention)
    for is_training in (True, False):
        model.train(is_training)
        check(model, attention=attention, vocab_size=512)
        assert {module.training for module in model.modules()} == {is_training}


class Recurrent(nn.Module):
    """A model whose state runs on over the borders of documents."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(48, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 48)

    def forward(self, input_ids, position_ids, use_cache):
        return type("Output", (), {"logits": self.head(self.gru(self.embedding(input_ids))[0])})


def test_a_recurrent_model_is_refused():
    torch.manual_seed(0)
    model = Recurrent()
    with pytest.raises(UserError, match=r"does not keep packed documents apart.*packing\.enabled=false"):
        check(model)
    assert model.training


@pytest.mark.parametrize(
    "leak",
    [{"attention_mask": torch.ones(2, 19, dtype=torch.int64)}, {"position_ids": None}],
    ids=["a mask beside the positions", "no positions"],
)
def test_attention_that_overlooks_the_positions_is_refused(stories, leak):
    def forward(model, batch):
        return forward_logits(model, replace(batch, inputs=batch.inputs | leak))

    with pytest.raises(
        UserError, match=r"'eager' does not keep.*enabled=false, or try model\.attn_implementation=sdpa"
    ):
        check(load(stories, "eager"), attention="eager", forward=forward, vocab_size=512)
    with pytest.raises(UserError, match=r"'sdpa' does not keep.*enabled=false\. No setting helps"):
        check(load(stories, "sdpa"), forward=forward, vocab_size=512)


def test_a_model_that_takes_no_positions_is_refused():
    class NoPositions(nn.Module):
        def forward(self, input_ids, use_cache):
            raise AssertionError("not reached")

    with pytest.raises(UserError, match=r"does not take packed rows.*position_ids"):
        check(NoPositions())


def test_a_model_that_does_not_look_at_its_tokens_is_refused():
    class Deaf(nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 48)})

    with pytest.raises(UserError, match="the same logits after its tokens were replaced"):
        check(Deaf())
