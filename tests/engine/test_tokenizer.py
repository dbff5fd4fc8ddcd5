"""Text to tokens and back, over a byte-level and a SentencePiece-like tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Raw
from transformers import PreTrainedTokenizerFast

from pdbatch.engine.tokenizer import PromptError, Tokenizer
from pdbatch.request import RequestSpec

CORPUS = ["the quick brown fox jumps over the lazy dog", "thé où naïve 你好 🙂 the fox"] * 5
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if tools %}T{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _byte_level() -> Tokenizer:
    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    raw.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return Tokenizer(fast, len(fast))


def _sentencepiece_like() -> Tokenizer:
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "▁th", "▁the", "he"]:
        vocab[piece] = len(vocab)
    merges = [("t", "h"), ("h", "e"), ("▁", "th"), ("▁th", "e")]
    raw = Raw(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence(prepend)
    strip = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *strip])
    raw.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    return Tokenizer(fast, len(fast))


BYTES, PIECES = _byte_level(), _sentencepiece_like()
both = pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])


@both
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24),
    at=st.integers(0, 40),
)
def test_pieces_add_up_to_the_text_behind_the_prompt(
    tokenizer: Tokenizer, text: str, at: int
) -> None:
    ids = tokenizer.encode(RequestSpec(prompt=text))
    at = min(at, len(ids))
    whole = tokenizer.decode(ids)
    for cut in (0, at):
        stream = tokenizer.detokenizer(ids[:cut])
        pieces = [stream.push([token]) for token in ids[cut:]] + [stream.flush()]
        if cut == 0:
            assert "".join(pieces) == whole
        elif "\ufffd" not in tokenizer.decode(ids[:cut]):
            assert tokenizer.decode(ids[:cut]) + "".join(pieces) == whole


@both
def test_a_character_of_several_tokens_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(RequestSpec(prompt="a🦜b"))
    stream = tokenizer.detokenizer()
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) == "a🦜b"
    assert "🦜" in pieces
    assert all("\ufffd" not in piece for piece in pieces)


@both
def test_an_incomplete_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(RequestSpec(prompt="ok 🦜"))[:-1]
    stream = tokenizer.detokenizer()
    assert (shown := stream.push(ids)).strip() == "ok"
    rest = stream.flush()
    assert (shown + rest).rstrip("\ufffd") == "ok " and rest.endswith("\ufffd")
    assert stream.flush() == ""


def test_broken_bytes_do_not_hold_text_back_for_ever() -> None:
    broken = PIECES.encode(RequestSpec(prompt="🦜"))[-1]
    stream = PIECES.detokenizer()
    shown = [stream.push([broken]) for _ in range(40)]
    assert any(shown)


def test_a_leading_space_follows_from_the_prompt() -> None:
    the = PIECES.encode(RequestSpec(prompt="the the"))
    assert PIECES.detokenizer(the[:1]).push(the[1:]) == " the"
    assert PIECES.detokenizer().push(the[1:]) == "the"
    assert PIECES.token_text(the[0]) == " the"


def test_special_tokens_are_no_text_but_have_names() -> None:
    assert BYTES.detokenizer().push([*BYTES.encode(RequestSpec(prompt="fox")), 1]) == "fox"
    assert BYTES.token_text(1) == "</s>"
    assert BYTES.eos_token_ids == (1,)


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    assert BYTES.encode(RequestSpec(prompt_token_ids=(5, 6))) == [5, 6]
    for ids in ((5, BYTES.vocab_size), (-1,), ()):
        with pytest.raises(PromptError, match=r"prompt_token_ids|outside") as caught:
            BYTES.encode(RequestSpec(prompt_token_ids=ids))
        assert caught.value.param == "prompt_token_ids"


def test_messages_go_through_the_chat_template() -> None:
    spec = RequestSpec(
        messages=[
            {"role": "user", "content": "the "},
            {"role": "user", "content": [{"type": "text", "text": "fox"}]},
        ],
        tools=[{"type": "function"}],
    )
    text = BYTES.decode(BYTES.encode(spec))
    assert text == "<|user|>the <|user|>foxT1<|assistant|>"


@pytest.mark.parametrize(
    ("spec", "param", "message"),
    [
        (RequestSpec(prompt=""), "prompt", "empty"),
        (RequestSpec(prompt="a\ud800"), "prompt", "no valid text"),
        (RequestSpec(messages=[]), "messages", "empty"),
        (RequestSpec(messages=[{"role": "robot", "content": ""}]), "messages", "no robots"),
        (
            RequestSpec(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0]",
            "text only",
        ),
    ],
)
def test_a_prompt_that_cannot_be_read_names_its_field(
    spec: RequestSpec, param: str, message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        BYTES.encode(spec)
    assert caught.value.param == param


def test_a_model_without_a_template_or_a_tokenizer_says_so(tmp_path: Path) -> None:
    spec = RequestSpec(messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(PromptError, match="no chat template"):
        PIECES.encode(spec)
    bare = Tokenizer.load(tmp_path, 10)
    with pytest.raises(PromptError, match="no tokenizer"):
        bare.encode(RequestSpec(prompt="x"))
    assert bare.encode(RequestSpec(prompt_token_ids=(9,))) == [9]
    assert bare.detokenizer().push([1, 2]) == bare.token_text(3) == ""


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    BYTES._hf.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path, BYTES.vocab_size)
    spec = RequestSpec(messages=[{"role": "user", "content": "the fox"}])
    assert again.encode(spec) == BYTES.encode(spec)
