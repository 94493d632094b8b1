"""Tokenizers: the checkpoint's own, prompts to padded batches, a text to its one token."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from arrakis_jax.checks import checked_choice
from arrakis_jax.errors import expected


def tokenizer_for(path_or_repo_id: str | Path, *, revision: str | None = None) -> Any:
    """The `transformers` tokenizer of a checkpoint.

    Args:
        path_or_repo_id: a local folder, or a hub id.
        revision: of a hub id.

    Raises:
        ValueError: if there is none.
    """
    # Imported here: neither is needed by the functions of arrays. AutoTokenizer imports torch if
    # that is installed, so it serves only tokenizers without a tokenizer.json.
    from transformers import PreTrainedTokenizerFast

    path = Path(path_or_repo_id)
    source = str(path_or_repo_id)
    try:
        if not path.is_dir() or (path / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        must = "a folder or hub id with a tokenizer"
        do = f"look for tokenizer.json in it ({error})"
        raise ValueError(expected("path_or_repo_id", must, repr(source), do)) from error


def encode(
    tokenizer: Any,
    prompts: str | list[str],
    *,
    bos: bool | Literal["model"] = "model",
    side: Literal["left", "right"] = "left",
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one padded batch.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompts: one text or several.
        bos: "model" adds the special tokens that the tokenizer itself adds; True makes each row
            start with exactly one BOS; False adds nothing.
        side: where padding goes.

    Returns:
        Token ids, int32 `[B,T]`, and the mask, bool `[B,T]`, True at real tokens.

    Raises:
        ValueError: for no prompt, a prompt without a token, or bos=True without a BOS token.
    """
    checked_choice("side", side, ("left", "right"))
    checked_choice("bos", bos, ("model", True, False))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        do = "pass one text or a list of texts"
        raise ValueError(expected("prompts", "texts", repr(prompts), do))
    rows = [tokenizer(text, add_special_tokens=bos == "model").input_ids for text in texts]
    first = tokenizer.bos_token_id
    if bos is True:
        if first is None:
            do = "this tokenizer has no BOS token"
            raise ValueError(expected("bos", "'model' or False", "True", do))
        rows = [row if row[:1] == [first] else [first, *row] for row in rows]
    if bos == "model" and first is not None:
        # A text that spells out the BOS itself gets no second one.
        rows = [row[1:] if row[:2] == [first, first] else row for row in rows]
    empty = [i for i, row in enumerate(rows) if not set(row) - {first}]
    empty = [i for i in empty if not texts[i].strip() or not rows[i]]
    if empty:
        do = "drop them"
        raise ValueError(expected("prompts", "texts of at least one token", f"{empty} empty", do))
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for row, token_row, mask_row in zip(rows, tokens, mask, strict=True):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        token_row[where], mask_row[where] = row, True
    return tokens, mask


def token_id(tokenizer: Any, text: str) -> int:
    """The id of a text that is exactly one token, such as " Mary" (the space counts).

    Raises:
        ValueError: if the text is several tokens, or none; the message shows them.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) > 1:
        # Tokenizers that mark spaces on words may give " Mary" a lone space in front.
        rest = [i for i in ids if tokenizer.decode([i]).strip()]
        bare = tokenizer(text.strip(), add_special_tokens=False).input_ids
        if len(rest) == 1 and bare == rest and text.strip():
            ids = rest
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]
        do = "a leading space often matters"
        raise ValueError(expected("text", "exactly one token", f"{text!r} = {pieces}", do))
    return int(ids[0])
