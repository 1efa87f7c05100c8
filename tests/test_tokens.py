"""Captions as tokens: whole ones as the tokenizer gives them, subsets of sentences as if they had been written. Hermetic."""

import pytest
import torch
from transformers import CLIPTokenizer

from tests.conftest import ROOT
from utils.tokens import TokenizedCaptions, tokenize

CAPTION = "PA chest radiograph of a 60-year-old man. Left pleural effusion. Cardiomegaly. No pneumothorax."


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "assets" / "cxr-tiny" / "tokenizer")


def text_of(tokenizer: CLIPTokenizer, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_whole_caption_is_the_tokenizers(tokenizer: CLIPTokenizer) -> None:
    captions = TokenizedCaptions(tokenizer, [CAPTION, "Chest film."], by_sentence=True)
    assert torch.equal(captions[0], tokenize(tokenizer, [CAPTION])[0])
    assert torch.equal(captions.subset(0, 0.0, seed=1), captions[0])
    assert torch.equal(captions.subset(1, 1.0, seed=1), captions[1])


def test_a_subset_is_what_the_tokenizer_makes_of_the_sentences_left(tokenizer: CLIPTokenizer) -> None:
    captions, sentences = TokenizedCaptions(tokenizer, [CAPTION], by_sentence=True), CAPTION.split(". ")
    possible = set()
    for number in range(8):  # in or out, for each sentence but the first
        kept = [sentences[0], *(part for i, part in enumerate(sentences[1:]) if number >> i & 1)]
        possible.add(tuple(tokenize(tokenizer, [". ".join(part.rstrip(".") for part in kept) + "."])[0].tolist()))
    drawn = [tuple(captions.subset(0, 0.5, seed).tolist()) for seed in range(100)]
    assert set(drawn) == possible
    assert drawn[7] == tuple(captions.subset(0, 0.5, seed=7).tolist())


def test_all_but_the_first_sentence_may_go(tokenizer: CLIPTokenizer) -> None:
    captions = TokenizedCaptions(tokenizer, [CAPTION], by_sentence=True)
    assert torch.equal(captions.subset(0, 1.0, seed=0), tokenize(tokenizer, [CAPTION.split(". ")[0] + "."])[0])


def test_sentences_beyond_the_window_have_their_turn(tokenizer: CLIPTokenizer) -> None:
    finding = "There is a small pleural effusion on the left side of the chest."
    caption = " ".join(["Chest film.", *[finding] * 12, "Cardiomegaly."])
    captions = TokenizedCaptions(tokenizer, [caption], by_sentence=True)
    length = tokenizer.model_max_length
    subsets = [captions.subset(0, 0.7, seed) for seed in range(60)]
    assert {len(ids) for ids in [captions[0], *subsets]} == {length}
    last = tokenizer("Cardiomegaly.", add_special_tokens=False).input_ids[0]
    assert last not in captions[0].tolist()
    assert any(last in ids.tolist() for ids in subsets)
    assert all(ids.tolist().count(tokenizer.bos_token_id) == 1 for ids in subsets)


def test_what_captions_lose_is_counted(tokenizer: CLIPTokenizer) -> None:
    long = " ".join(["Chest film."] + ["There is a small pleural effusion on the left side."] * 20)
    unbroken = "Chest film of " + "left pleural effusion and " * 40 + "nothing else."
    captions = TokenizedCaptions(tokenizer, [CAPTION, long, unbroken])
    assert (captions.num_shortened, captions.num_cut) == (1, 1)
    assert torch.equal(captions.whole, tokenize(tokenizer, [CAPTION, long, unbroken]))
