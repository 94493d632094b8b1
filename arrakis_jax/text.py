"""Tokenizers of checkpoints, prompts as padded batches, and the id of a token."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arrakis_jax.checkpoint import local_folder
from arrakis_jax.core.checks import checked_choice
from arrakis_jax.core.errors import CheckpointError, expected
from arrakis_jax.core.prompts import PADDING_ID, Prompts

_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_DOWNLOADED = ("*.json", "*.txt", "*.model")
_TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|spiece.*)\.(json|txt|model)"
)


def tokenizer_for(path_or_repo_id: str | Path, *, revision: str | None = None) -> Any:
    """The `transformers` tokenizer of a checkpoint, as its files describe it.

    Args:
        path_or_repo_id: a local folder, or a hub id (HF_HUB_OFFLINE is honoured).
        revision: branch, tag or commit of a hub id.

    Returns:
        A `PreTrainedTokenizerFast` if there is a tokenizer.json. Otherwise the tokenizer that
        AutoTokenizer finds; AutoTokenizer imports torch if that is installed.

    Raises:
        CheckpointError: if there is no tokenizer.
    """
    folder = local_folder(path_or_repo_id, revision=revision, files=_DOWNLOADED)
    try:
        if (folder / "tokenizer.json").is_file():
            with _no_advice():
                from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder)
        # Without tokenizer.json only AutoTokenizer knows the tokenizer's class.
        if any(folder.glob("*token*")) or any(folder.glob("vocab*")):
            with _no_advice():
                from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        reason = "copy tokenizer.json into it"
    except Exception as error:  # the parser, which is written in Rust, raises nothing narrower
        reason = f"check its files ({error})"
    must = "a folder or a hub id with a tokenizer"
    raise CheckpointError(expected("path_or_repo_id", must, repr(str(path_or_repo_id)), reason))


def copy_tokenizer(path_or_repo_id: str | Path, folder: Path) -> list[str]:
    """Copies the tokenizer's files from a checkpoint to a folder, and returns their names."""
    source = local_folder(path_or_repo_id, files=_DOWNLOADED)
    files = sorted(file for file in source.iterdir() if _TOKENIZER_FILE.fullmatch(file.name))
    return [shutil.copyfile(file, folder / file.name).name for file in files]


def encode(
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    bos: bool | Literal["model"] = "model",
    side: Literal["left", "right"] = "left",
    width: int | None = None,
    pad_to: int = 1,
) -> Prompts:
    """Prompts as one padded batch. No pad token is needed: padding has id -1, and the mask tells.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompts: one text or several.
        bos: "model" adds the special tokens that the tokenizer adds by itself. True adds one BOS in
            front and nothing else. False adds nothing. A prompt that begins with the text of the
            BOS token gets no other; as many as it has are kept.
        side: where padding goes.
        width: the number of columns; None for the longest prompt's length. A width of its own keeps
            the shape, so that prompts of other lengths compile nothing new.
        pad_to: without `width`, the length is rounded up to a multiple of this.

    Returns:
        `Prompts`, which every tool takes in place of tokens and mask. It unpacks as `tokens, mask`:
        token ids, int32 `[B,T]`, and the mask, bool `[B,T]`, True at real tokens. Masked ids are
        not read; they are -1, so that ids without their mask are refused.

    Raises:
        TypeError: for prompts that are not texts.
        ValueError: for no prompt, a prompt without a token, bos=True without a BOS token, or a
            prompt longer than `width`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> prompts = encode(tokenizer, ["Mary went to the store", "John"], pad_to=8)
        >>> tokens, mask = prompts
        >>> prompts.width, tokens.shape, mask.sum(-1).tolist()
        (8, (2, 8), [6, 2])
    """
    checked_choice("side", side, ("left", "right"))
    checked_choice("bos", bos, ("model", True, False))
    bos = bos if bos == "model" else bool(bos)  # 1 passes the check as True, which it equals
    if not isinstance(prompts, Iterable):
        do = "pass one text, or a list of texts"
        raise TypeError(expected("prompts", "texts", type(prompts).__name__, do))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        do = "pass one text, or a list of texts"
        raise TypeError(expected("prompts", "texts", type(wrong[0]).__name__, do))
    if not texts:
        raise ValueError(expected("prompts", "at least one text", "none", "pass some"))
    first = tokenizer.bos_token_id
    if bos is True and first is None:
        do = "this tokenizer has no BOS token"
        raise ValueError(expected("bos", "'model' or False", "True", do))
    rows = [_row(tokenizer, text, bos) for text in texts]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        got = f"none in prompts {empty[:5]}"
        do = "drop them, or pass bos=True"
        raise ValueError(expected("prompts", "texts of at least one token", got, do))
    return _padded(rows, side, _width(max(map(len, rows)), width, pad_to))


def _width(longest: int, width: int | None, pad_to: int) -> int:
    """The number of columns for prompts of which the longest has this many tokens."""
    for name, value in (("width", width), ("pad_to", pad_to)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not (whole and value > 0):
            raise ValueError(expected(name, "a positive int", repr(value), "count columns"))
    if width is None:
        return -(-longest // pad_to) * pad_to
    if longest > width:
        do = f"give a width of at least {longest}, or shorter prompts: nothing is cut"
        raise ValueError(expected("width", "no less than the longest prompt", width, do))
    return width


def _padded(rows: list[list[int]], side: str, width: int) -> Prompts:
    """Rows of token ids as one batch with padding on this side."""
    tokens = np.full((len(rows), width), PADDING_ID, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        tokens[b, start : start + len(row)] = row
        mask[b, start : start + len(row)] = True
    return Prompts(tokens, mask)


def token_id(tokenizer: Any, text: str) -> int:
    """The id of a text that is exactly one token, such as " Mary" (the space counts).

    It is the token that continues a text by exactly these characters. Some tokenizers put a space
    in front of every text (SentencePiece). There "in" is the piece inside of words, and " in" the
    piece that begins one. Only if no token is the text itself, it is the one token that such a
    tokenizer makes of it, which has the space too.

    Raises:
        TypeError: if `text` is not a text.
        ValueError: if it is several tokens, or none; the message shows them.
    """
    if not isinstance(text, str):
        do = "an id needs no look-up"
        raise TypeError(expected("text", "a text", type(text).__name__, do))
    ids = _ids(tokenizer, text, special=False)
    # The last of several ids: a tokenizer may have put a space, a token of its own, in front.
    for candidate in (*_named(tokenizer, text), *ids[-1:]):
        if continuation(tokenizer, candidate) == text:
            return candidate
    # The space may have become a token of its own, since the tokenizer puts another in front.
    if len(ids) != 1 and text[:1] == " ":
        bare = _ids(tokenizer, text[1:], special=False)
        if len(bare) == 1 and continuation(tokenizer, bare[0]) == text:
            ids = bare
    unknown = ids == [tokenizer.unk_token_id] and text != tokenizer.unk_token
    if len(ids) != 1 or unknown:
        got = f"{text!r}, which is {tokenizer.convert_ids_to_tokens(ids)}"
        raise ValueError(expected("text", "exactly one token", got, "mind the leading space"))
    return ids[0]


def _named(tokenizer: Any, text: str) -> list[Any]:
    """The ids of the names that SentencePiece could have for a text: as it is, or of its byte."""
    names = [text, text.replace(" ", "▁")]
    if len(text) == 1 and text.isascii():
        names.append(f"<0x{ord(text):02X}>")
    # A name that the vocabulary lacks has the id of the unknown token, or None.
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names if name}
    lacking = (None, tokenizer.unk_token_id)
    return [i for name, i in ids.items() if i not in lacking or name == tokenizer.unk_token]


@contextmanager
def _no_advice() -> Iterator[None]:
    """Keeps transformers from warning, on import, that PyTorch is not installed."""
    before = os.environ.get(_ADVICE)
    os.environ[_ADVICE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADVICE]
        else:
            os.environ[_ADVICE] = before


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _row(tokenizer: Any, text: str, bos: bool | Literal["model"]) -> list[Any]:
    """The ids of a text with what `bos` adds; without an added BOS if the text has its own."""
    first, own = tokenizer.bos_token_id, _ids(tokenizer, text, special=False)
    has_own = first is not None and own[:1] == [first]
    if bos is not True:
        row = _ids(tokenizer, text, special=True) if bos else own
        # Two BOS where the text begins with one: the first of them was added.
        return row[1:] if has_own and row[: len(own) + 1] == [first, *own] else row
    return own if has_own else [first, *own]


def continuation(tokenizer: Any, token: int) -> str:
    """The text that a token adds when it follows other tokens."""
    # Decoded twice in a row, since a tokenizer may drop the space before the first token of a text.
    once, twice = (
        tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2)
    )
    return twice[len(once) :]
