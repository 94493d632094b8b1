"""Tokenizers: BOS exactly where asked, padding without a pad token, one token or an error."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from arrakis_jax.core.errors import CheckpointError
from arrakis_jax.demo import demo_model
from arrakis_jax.text import continuation, encode, token_id, tokenizer_for


def sentencepiece(**options) -> PreTrainedTokenizerFast:
    """Puts a space in front of every text and a BOS in front of that, as Llama's does."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "M", "ary", "▁M", "▁Mary", "Mary", "▁John", "x", "▁x"]
    vocab = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    inner = Tokenizer(models.Unigram(vocab, unk_id=0))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if options.pop("adds_bos", True):
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>") | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def byte_level(**options) -> PreTrainedTokenizerFast:
    """Marks the space in the token and adds nothing, as GPT-2's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("M", "a"), ("r", "y"), ("Ma", "ry"), ("Ġ", "Mary")]
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def test_bos_of_a_tokenizer_that_adds_it():
    tokenizer = sentencepiece()
    for bos in ("model", True):
        prompts = [" Mary", "<s>Mary", "<s><s> Mary", "<s><s><s><s><s>x", "Mary<s>"]
        tokens, mask = encode(tokenizer, prompts, bos=bos)
        real = [row[here].tolist() for row, here in zip(tokens, mask, strict=True)]
        assert [row.count(1) for row in real] == [1, 1, 2, 5, 2]
        assert all(row[0] == 1 for row in real)
    kept = encode(tokenizer, ["<s><s> Mary", "Mary"], bos=False, side="right").tokens
    assert kept[0, :2].tolist() == [1, 1] and 1 not in kept[1]
    assert encode(tokenizer, "Mary John", bos=False).tokens.tolist() == [[7, 9]]
    assert encode(tokenizer, "", bos="model").tokens.tolist() == [[1]]


def test_bos_of_a_tokenizer_that_does_not():
    tokenizer = byte_level(bos_token="<|endoftext|>")
    bos, mary = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("Mary")
    assert encode(tokenizer, "Mary").tokens.tolist() == [[mary]]
    assert encode(tokenizer, "Mary", bos=True).tokens.tolist() == [[bos, mary]]
    assert encode(tokenizer, "<|endoftext|>Mary", bos=True).tokens.tolist() == [[bos, mary]]
    assert encode(tokenizer, "<|endoftext|>Mary").tokens.tolist() == [[bos, mary]]
    assert encode(tokenizer, "", bos=True).tokens.tolist() == [[bos]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    tokenizer = byte_level()
    assert tokenizer.pad_token_id is None
    prompts = ["Mary", "Mary Mary Mary", "!!"]
    tokens, mask = encode(tokenizer, prompts, side=side)
    assert (tokens.dtype, mask.dtype, tokens.shape) == (np.int32, bool, (3, 3))
    for b, prompt in enumerate(prompts):
        ids = tokenizer(prompt)["input_ids"]
        where = slice(3 - len(ids), 3) if side == "left" else slice(len(ids))
        assert tokens[b, where].tolist() == ids
        assert mask[b, where].all() and mask[b].sum() == len(ids)
        assert (tokens[b][~mask[b]] == -1).all()


def test_width():
    tokenizer = byte_level()
    prompts = ["Mary", "Mary Mary Mary"]
    whole = encode(tokenizer, prompts)
    assert whole.width == 3
    for wide in (encode(tokenizer, prompts, width=5), encode(tokenizer, prompts, pad_to=5)):
        assert (wide.width, len(wide), wide.shape) == (5, 2, (2, 5))
        np.testing.assert_array_equal(wide.tokens[:, 2:], whole.tokens)
        np.testing.assert_array_equal(wide.mask[:, 2:], whole.mask)
    assert encode(tokenizer, prompts, pad_to=3, side="right").width == 3
    with pytest.raises(ValueError, match="`width` must be no less than the longest prompt, got 2"):
        encode(tokenizer, prompts, width=2)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="`width` must be a positive int"):
            encode(tokenizer, prompts, width=wrong)
        with pytest.raises(ValueError, match="`pad_to` must be a positive int"):
            encode(tokenizer, prompts, pad_to=wrong)


def test_bad_prompts():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="`prompts` must be at least one text, got none"):
        encode(tokenizer, [])
    with pytest.raises(ValueError, match=r"`prompts` must be .* got none in prompts \[1\]"):
        encode(tokenizer, ["Mary", ""])
    with pytest.raises(TypeError, match="`prompts` must be texts, got int"):
        encode(tokenizer, [1, 2])
    with pytest.raises(ValueError, match="`bos` must be 'model' or False, got True"):
        encode(tokenizer, "Mary", bos=True)
    with pytest.raises(ValueError, match="`side` must be one of"):
        encode(tokenizer, "Mary", side="both")
    with pytest.raises(ValueError, match="`bos` must be one of"):
        encode(tokenizer, "Mary", bos="never")


def test_token_id_with_the_space_in_the_token():
    tokenizer = byte_level()
    assert tokenizer.convert_ids_to_tokens(token_id(tokenizer, " Mary")) == "ĠMary"
    assert tokenizer.convert_ids_to_tokens(token_id(tokenizer, "Mary")) == "Mary"
    with pytest.raises(ValueError, match=r"must be exactly one token, got ' May', .*'Ma', 'y'\]"):
        token_id(tokenizer, " May")
    with pytest.raises(ValueError, match=r"exactly one token, got '  Mary', .*'Ġ', 'ĠMary'\]"):
        token_id(tokenizer, "  Mary")
    with pytest.raises(ValueError, match="exactly one token, got ''"):
        token_id(tokenizer, "")
    with pytest.raises(TypeError, match="`text` must be a text, got int"):
        token_id(tokenizer, 5)


def test_token_id_with_a_space_in_front_of_every_text():
    tokenizer = sentencepiece()
    assert tokenizer(" Mary", add_special_tokens=False)["input_ids"] == [3, 7]
    assert token_id(tokenizer, " Mary") == 7
    assert token_id(tokenizer, "Mary") == 8
    assert (token_id(tokenizer, "x"), token_id(tokenizer, " x")) == (10, 11)
    assert token_id(tokenizer, "<s>") == 1
    for text in ("  Mary", " Mary John", "Mary x"):
        with pytest.raises(ValueError, match="`text` must be exactly one token, got"):
            token_id(tokenizer, text)


def test_an_unknown_word_is_not_a_token():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "Mary": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_id(tokenizer, "Mary") == 1
    assert token_id(tokenizer, "<unk>") == 0
    with pytest.raises(ValueError, match=r"exactly one token, got 'John', .*'<unk>'\]"):
        token_id(tokenizer, "John")


def test_tokenizer_of_a_folder(tmp_path):
    sentencepiece().save_pretrained(tmp_path)
    tokenizer = tokenizer_for(tmp_path)
    assert tokenizer("Mary John")["input_ids"] == [1, 7, 9]
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", None)


def test_no_tokenizer(tmp_path):
    (tmp_path / "arrakis_jax.json").write_text(json.dumps({}))
    message = "`path_or_repo_id` must be a folder or a hub id with a tokenizer, got"
    with pytest.raises(CheckpointError, match=message):
        tokenizer_for(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=message):
        tokenizer_for(tmp_path)
    with pytest.raises(CheckpointError, match="must be a folder, or a hub id .*, got 'no/where'"):
        tokenizer_for("no/where")


def test_torch_is_not_imported(tmp_path):
    sentencepiece().save_pretrained(tmp_path)
    code = (
        "import sys; from arrakis_jax.text import encode, tokenizer_for\n"
        "assert 'transformers' not in sys.modules\n"
        f"print(encode(tokenizer_for({str(tmp_path)!r}), 'Mary').tokens, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[1 7]] False"


def test_every_token_is_the_id_of_its_own_text(stories):
    """Of tokens that continue a text alike, a piece comes before the byte that it is."""
    for tokenizer in (tokenizer_for(stories), byte_level(), demo_model()[1]):
        texts = [continuation(tokenizer, i) for i in range(len(tokenizer))]
        asked = [text for text in texts if text and "\ufffd" not in text]
        assert len(asked) > 100
        assert [texts[token_id(tokenizer, text)] for text in asked] == asked
        unique = [i for i, text in enumerate(texts) if text in asked and texts.count(text) == 1]
        assert [token_id(tokenizer, texts[i]) for i in unique] == unique


def test_stories(stories):
    tokenizer = tokenizer_for(stories)
    pieces = tokenizer.get_vocab()
    assert token_id(tokenizer, "in") == pieces["in"] != pieces["▁in"] == token_id(tokenizer, " in")
    assert token_id(tokenizer, "\n") == pieces["<0x0A>"]
    assert tokenizer.convert_ids_to_tokens(token_id(tokenizer, " Lily")) == "▁Lily"
    assert token_id(tokenizer, " Lily") == token_id(tokenizer, "Lily")
    text = "Lily saw a ball."
    ids = encode(tokenizer, text).tokens[0]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    with pytest.raises(ValueError, match=r"exactly one token, got ' Mary', .*'▁M', 'ar', 'y'\]"):
        token_id(tokenizer, " Mary")
