"""Captions as the text encoder reads them: fitted into its window, tokenised once, whole or some of their sentences."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from utils.captions import fit, sentences_of


def fit_captions(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """Return captions whose length the tokenizer takes, longer ones cut after a sentence; see `captions.fit`."""
    if not captions:  # of which the tokenizer makes an error
        return []
    limit = tokenizer.model_max_length

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    lengths = map(len, tokenizer(list(captions), verbose=False).input_ids)  # all at once: most need no cut
    return [
        caption if length <= limit else fit(caption, count_tokens, limit)
        for caption, length in zip(captions, lengths, strict=True)
    ]


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return the tokens of captions, fitted and padded to the model's length, int64 [N, L].

    A sentence that is too long by itself is cut within.
    """
    options = dict(padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return tokenizer(fit_captions(tokenizer, captions), return_tensors="pt", **options).input_ids


def read_of(tokenizer: CLIPTokenizer, fitted: Sequence[str]) -> list[str]:
    """Return fitted captions as far as the tokenizer reads them: short of their end where it cuts within a sentence."""
    if not fitted:
        return []
    options = dict(truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True)
    ends = [max(end for _, end in places) for places in tokenizer(list(fitted), **options).offset_mapping]
    return [caption[:end] if caption[end:].strip() else caption for caption, end in zip(fitted, ends, strict=True)]


class TokenizedCaptions:
    """Captions tokenised once. Item i is the whole caption, as `tokenize` gives it, int64 [L].

    Attributes:
        num_shortened: captions that lose sentences beyond the window.
        num_cut: captions that are cut within a sentence.
    """

    def __init__(self, tokenizer: CLIPTokenizer, captions: Sequence[str], by_sentence: bool = False):
        """Tokenise captions, and their sentences one by one where `subset` will be asked for."""
        fitted, limit = fit_captions(tokenizer, captions), tokenizer.model_max_length
        lengths = list(map(len, tokenizer(fitted, verbose=False).input_ids))
        self.num_shortened = sum(map(str.__ne__, captions, fitted))
        self.num_cut = sum(length > limit for length in lengths)
        self.whole = tokenize(tokenizer, fitted)
        sentences = [sentences_of(caption) if by_sentence else [] for caption in captions]
        ids = iter(tokenizer([s for part in sentences for s in part] or [""], add_special_tokens=False).input_ids)
        self.sentences = [[next(ids) for _ in part] for part in sentences]
        self.first, self.last, self.padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

    def __getitem__(self, index: int) -> Tensor:
        return self.whole[index]

    def subset(self, index: int, dropout: float, seed: int) -> Tensor:
        """Return a caption less some of its sentences, int64 [L]; for captions tokenised `by_sentence`.

        The first, which names the view, stays; each other is left out with probability `dropout`, and so is what then
        does not fit, from the end. A sentence that no window holds together with those before it so has its turn, too.

        Args:
            index: of the caption.
            dropout: probability in [0, 1].
            seed: of the draw.
        """
        first, *others = self.sentences[index]
        draws = torch.rand(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        kept, room = list(first), self.whole.shape[1] - 2
        for sentence in (tokens for tokens, draw in zip(others, draws, strict=True) if draw >= dropout):
            if len(kept) + len(sentence) > room:
                break
            kept += sentence
        ids = [self.first, *kept[:room], self.last]
        return torch.tensor(ids + [self.padding] * (self.whole.shape[1] - len(ids)))
