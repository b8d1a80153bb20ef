"""Texts to words: the tokens of the text codec. Imports no torch."""

import re
import unicodedata
from functools import cache

END = "</s>"  # index 0 of every vocabulary; `tokenize` never yields it
HOLE = "_"  # a word to be filled in

# Characters without a width that do not end a word: soft hyphens, joiners, directions, variation selectors (Unicode's
# Default_Ignorable_Code_Point but for U+200B, which separates words, and letters).
IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)
# What NFKC leaves apart, or makes letters of.
PLAIN = str.maketrans(
    dict.fromkeys("‘’ʻʼ´\u1ffd", "'") | dict.fromkeys("‐‑", "-") | dict.fromkeys("™℠", " ") | {"ŉ": "'n"}
)
# Letters and digits, with inner hyphens and apostrophes, or underscores that touch no word.
ASCII_TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|(?<!\w)_+(?!\w)")


def tokenize(caption: str) -> list[str]:
    """Lower-case words of `caption`; punctuation is dropped, and a lone "_" (or "__" …) is a hole, given as "_".

    Equivalent characters become one (Unicode's NFKC: full-width letters, ligatures, composed accents). Words are
    separated by spaces and punctuation: Chinese, Japanese and Thai need spaces between their words.
    """
    text, pattern = caption.lower(), ASCII_TOKEN
    if not text.isascii():
        pattern = _token()
        text = IGNORED.sub("", caption).translate(PLAIN)
        # Twice, since small letters may have composed forms that capitals have not.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower().replace("i\u0307", "i"))  # İ
    return [HOLE if token[0] == HOLE else token for token in pattern.findall(text)]


def caption_words(caption: str) -> list[str]:
    """The words of a data set's caption, in which a lone "_" is not a word to be filled in and is left out."""
    return [word for word in tokenize(caption) if word != HOLE]


def shortened(caption: str, words: int) -> str:
    """The first `words` words of a caption."""
    return " ".join(caption_words(caption)[:words])


@cache
def _token() -> re.Pattern[str]:
    """ASCII_TOKEN for all of Unicode; made for the first text that needs it, since finding the marks takes 30 ms."""
    # Combining marks: accents without a composed letter, the vowel signs of Hindi and Thai, …
    marks = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c) in ("Mn", "Mc"))
    word = rf"[^\W_]+(?:[{marks}]+[^\W_]*)*"
    return re.compile(rf"{word}(?:['-]{word})*|(?<![\w{marks}])_+(?!\w)")
