"""The tokenizer of the `tiny` model: one token a byte, so that any prompt has ids without any download."""

from __future__ import annotations

from pathlib import Path

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
BYTE_ID_OFFSET = 3
"""The id of byte b is `BYTE_ID_OFFSET + b`."""


def write_byte_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` with 259 ids: padding, `</s>`, unknown, then the 256 bytes; `</s>` ends every prompt.

    The file is the same on every machine.

    Args:
        folder: Made where it does not exist.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    specials = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNK_ID}
    vocab = {**specials, **{symbol: BYTE_ID_OFFSET + byte for byte, symbol in _byte_symbols().items()}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def _byte_symbols() -> dict[int, str]:
    """Return the printable character by which byte-level tokenizers spell each byte.

    A printable Latin-1 byte is its own character; the others take the characters from U+0100 on, in order.
    """
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(symbol): symbol for symbol in symbols if ord(symbol) < 256}
    others = (symbol for symbol in symbols if ord(symbol) >= 256)
    return {byte: own[byte] if byte in own else next(others) for byte in range(256)}
