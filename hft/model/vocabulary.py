"""Whether a tokenizer and a model's embeddings belong together."""

from pathlib import Path

from hft.errors import HFTError, reason

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of each token of a model folder's tokenizer; empty if the folder has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return {}
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # tokenizers raises whatever its parsers do
        raise HFTError(f"cannot read the tokenizer of {folder}: {reason(error)}") from error


def ids_beyond(tokens: dict[str, int], rows: int) -> list[str]:
    """A sentence if tokens have ids beyond the rows of the embeddings, as Gemma 3 1B's has for images."""
    beyond = sorted((index, token) for token, index in tokens.items() if index >= rows)
    if not beyond:
        return []
    index, token = beyond[0]
    return [
        f"the tokenizer has {len(beyond)} ids without a row in the embeddings, which have {rows}, the first is "
        f"{index}, {token!r}: text that holds one cannot be used"
    ]


def check_same_ids(ours: dict[str, int], theirs: dict[str, int], names: tuple[str, str]) -> None:
    """Refuse two vocabularies that have different tokens for one id: that row of the embeddings would be mixed."""
    tokens = {index: token for token, index in ours.items()}
    for token, index in sorted(theirs.items(), key=lambda item: item[1]):
        if tokens.get(index, token) != token:
            raise HFTError(
                f"{names[0]} and {names[1]} do not fit together: id {index} is {tokens[index]!r} in the first and "
                f"{token!r} in the second"
            )
