"""Whether a tokenizer and a model's embeddings belong together."""

from __future__ import annotations

from pathlib import Path

from hft.errors import HFTError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of each token of a model folder's tokenizer; empty if the folder has none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return {}
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()


def check_ids(tokens: dict[str, int], rows: int, name: str) -> None:
    """Refuse a tokenizer with an id that the embeddings have no row for.

    Args:
        tokens: the id of each token.
        rows: of the embeddings.
        name: of the model, for the message.

    Raises:
        HFTError: there is such an id.
    """
    if tokens and (last := max(tokens, key=tokens.get)) and tokens[last] >= rows:
        raise HFTError(
            f"the tokenizer of {name} has id {tokens[last]} for {last!r}, and its embeddings have {rows} rows; give "
            "the tokenizer that the model was trained with, or resize the embeddings first"
        )


def check_same_ids(ours: dict[str, int], theirs: dict[str, int], names: tuple[str, str]) -> None:
    """Refuse two vocabularies that have different tokens for one id, since that row of the embeddings would be mixed.

    Raises:
        HFTError: there is such an id.
    """
    tokens = {index: token for token, index in ours.items()}
    for token, index in sorted(theirs.items(), key=lambda item: item[1]):
        if tokens.get(index, token) != token:
            raise HFTError(
                f"{names[0]} and {names[1]} do not fit together: id {index} is {tokens[index]!r} in the first and "
                f"{token!r} in the second"
            )
