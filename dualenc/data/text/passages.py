"""Passages: windows of a long text."""

from collections.abc import Sequence

from tokenizers import Encoding

from dualenc.data.text.tokenizer import Tokenizer


def cut_passages(tokenizer: Tokenizer, texts: Sequence[str], size: int, stride: int = 0) -> list[list[str]]:
    """Cut each text into windows; no token is lost, and words stay whole unless a word is longer than a window.

    Args:
        tokenizer: tokenizer that counts the tokens.
        texts: N texts; one that fits into a window stays whole.
        size: most tokens of a window, special tokens not counted.
        stride: least number of tokens that a window has in common with the window before, as far as words allow.

    Returns:
        The windows of each text, one at least.

    Raises:
        ValueError: If the stride is not smaller than the size.

    Example:
        >>> from dualenc import Tokenizer
        >>> from dualenc.data.text.passages import cut_passages
        >>> tokenizer = Tokenizer.train(["a b c d e"], vocab_size=40, context_length=8)
        >>> cut_passages(tokenizer, ["a b c d e", "a"], 3, 1)
        [['a b c', 'c d e'], ['a']]
    """
    if not 0 <= stride < size:
        raise ValueError(f"stride {stride} must lie between 0 and one less than the {size} tokens of a passage")
    return [
        [text] if len(one) <= size else [text[a:b] for a, b in _windows(one, size, stride)]
        for text, one in zip(texts, tokenizer.encode_whole(texts), strict=True)
    ]


def _windows(encoding: Encoding, size: int, stride: int) -> list[tuple[int, int]]:
    """Return where each window of a text begins and ends."""
    offsets, words, count = encoding.offsets, encoding.word_ids, len(encoding)

    def word_start(token: int, least: int) -> int:
        """Return the first token of a token's word, or the token itself if that comes before `least`."""
        first = token
        while first > least and first < count and words[first] == words[first - 1]:
            first -= 1
        return first if first == count or words[first] != words[first - 1] else token

    found, start, stop = [], 0, 0
    while stop < count:
        # A window ends after the one before, and has room for that: within a long word the search would not end else.
        stop = max(word_start(min(start + size, count), start + 1), stop + 1)
        found.append((offsets[start][0], offsets[stop - 1][1]))
        start = word_start(max(stop - stride, start + 1), max(stop + 1 - size, start + 1))
    return found
