"""Prompts to token ids."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from causal_forcing.runtime.errors import CheckpointError, PromptError, WeightsMissingError

TOKENIZER_FILE = "tokenizer.json"

_PROMPT_SUFFIXES = (".txt", ".md", ".prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompts:
    """Prompts as the text encoder takes them."""

    token_ids: npt.NDArray[np.int64]
    """Ids, end-of-sequence included, padded on the right: `[B, T]`."""
    token_mask: npt.NDArray[np.int64]
    """1 for tokens, 0 for padding: `[B, T]`."""
    dropped: tuple[str, ...]
    """The end of each prompt that did not fit and was cut, `""` where all of it did."""


class Tokenizer:
    """Turns prompts into a fixed number of token ids, as upstream does.

    Args:
        folder: Holds `tokenizer.json`.
        length: Ids per prompt T, end-of-sequence included.
        pad_id: Id of padding.

    Raises:
        WeightsMissingError: There is no such file.
        CheckpointError: The file is no tokenizer.
    """

    def __init__(self, folder: Path, *, length: int, pad_id: int) -> None:
        import tokenizers

        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise WeightsMissingError(
                f"no tokenizer at {path}; pass the folder that holds google/umt5-xxl/{TOKENIZER_FILE} with --wan-folder"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(
                f"{path} is damaged or no tokenizer ({' '.join(str(error).split())}); download it again"
            ) from error
        self._tokenizer.no_padding()
        # Truncation leaves room for what the post-processor appends, so end-of-sequence survives it.
        self._tokenizer.enable_truncation(length)
        self._length = length
        self._pad_id = pad_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Clean and tokenize prompts.

        Args:
            prompts: B prompts as the user wrote them, not cleaned: cleaning twice would unescape HTML twice as often.
        """
        texts = [clean_prompt(prompt) for prompt in prompts]
        encodings = self._tokenizer.encode_batch(texts)
        token_ids = np.full((len(texts), self._length), self._pad_id, dtype=np.int64)
        token_mask = np.zeros_like(token_ids)
        dropped = []
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            token_ids[row, : len(encoding.ids)] = encoding.ids
            token_mask[row, : len(encoding.ids)] = 1
            # Offsets count characters of the cleaned text; the first token that did not fit starts what was cut.
            dropped.append(text[encoding.overflowing[0].offsets[0][0] :].strip() if encoding.overflowing else "")
        return TokenizedPrompts(token_ids=token_ids, token_mask=token_mask, dropped=tuple(dropped))


def clean_prompt(text: str) -> str:
    """Repair mojibake, resolve HTML entities (twice, as upstream does), and collapse white space.

    Source: thu-ml/Causal-Forcing wan/modules/tokenizers.py, `clean="whitespace"`.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def read_prompt(text_or_path: str) -> str:
    """Return the prompt that an option names: the text itself, or the first non-empty line of a file.

    Raises:
        PromptError: The prompt is blank, or the file is missing, unreadable or blank.
    """
    if os.path.isfile(text_or_path):
        return _check_prompt(_first_line(Path(text_or_path)), f"prompt file {text_or_path!r}")
    if _looks_like_path(text_or_path):
        what = "is a folder" if os.path.isdir(text_or_path) else "does not exist"
        raise PromptError(f"prompt file {text_or_path!r} {what}; pass an existing text file, or the prompt itself")
    return _check_prompt(text_or_path, "the prompt")


def _first_line(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"prompt file {str(path)!r} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompt file {str(path)!r} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8"
        ) from error
    return next((line for line in text.splitlines() if line.strip()), "")


def _looks_like_path(text: str) -> bool:
    text = text.strip()
    has_separator = "/" in text or os.sep in text
    return text.lower().endswith(_PROMPT_SUFFIXES) or (has_separator and not re.search(r"\s", text))


def _check_prompt(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} is not valid Unicode at character {error.start}; pass it as UTF-8") from error
    # Blank is what is blank to the tokenizer: "&nbsp;" is.
    if not clean_prompt(text):
        raise PromptError(f'{what} is empty; describe the video, for example --prompt "a red fox runs through snow"')
    return text.strip()
