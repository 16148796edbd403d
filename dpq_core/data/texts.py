"""Texts named by a recipe, and the windows of tokens that models read.

Two ways to cut a text, for two purposes:

- `token_windows`, for perplexity: all rows joined by blank lines, tokenised once, cut into windows
  that do not overlap, the incomplete tail dropped. It is the number of the GPTQ and DPQ papers.
- `calibration_windows`, for statistics: each row is a document; documents follow one another with
  an end-of-text token between them, and the windows taken lie evenly over the whole stream, so that
  the choice needs no random numbers.

Either way a window may begin with the token that the model was trained to begin with
(`opening_token`).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpq_core.data import python_corpus
from dpq_core.data.conversations import written
from dpq_core.data.data_files import check_folder, holds_nothing, literal
from dpq_core.errors import DataError as DataError
from dpq_core.errors import first_line
from dpq_core.paths import exists
from dpq_core.recipe import TextDataset

_CORPUS = "python_docs"
_FILE_BUILDERS = {
    "arrow",
    "csv",
    "imagefolder",
    "json",
    "parquet",
    "text",
}  # of `datasets`: read data_files
_DOCUMENTS_A_CALL = 256  # of the tokenizer: bounds its lists of Python integers


def load_texts(dataset: TextDataset, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """The rows of a data set's text column, in order, empty ones included; of a column of messages,
    each row as the tokenizer's chat template writes it.

    Data files (local, gzipped, `s3://…`) are read afresh every time; data sets of the hub come
    from the cache of `datasets`, which keys them by commit.

    Raises:
        DataError: missing file, unknown split or column, rows that are no strings, no text at all,
            or a hub that cannot be reached; messages, and no chat template that takes them.
    """
    if dataset.messages_column is not None:
        with open_rows(dataset, dataset.messages_column) as rows:
            where = f"{label_of(dataset)}: column {dataset.messages_column!r}"
            return written(rows[dataset.messages_column][:], tokenizer, where)
    if dataset.path == _CORPUS:
        try:
            return python_corpus.documents(dataset.split)
        except ValueError as error:
            raise DataError(f"{_CORPUS}: {error}") from error
    label = label_of(dataset)
    with open_rows(dataset, dataset.text_column) as rows:
        texts: list[Any] = rows[dataset.text_column][:]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(
                f"{label}: column {dataset.text_column!r}, row {number}: {kind}, not a string"
            )
    if not any(text.strip() for text in texts):
        raise DataError(f"{label}: no text in column {dataset.text_column!r} ({len(texts)} rows)")
    return texts


@contextmanager
def open_rows(dataset: TextDataset, *columns: str) -> Iterator[Any]:
    """The rows of a data set, a `datasets.Dataset` that has these columns, read as asked for.

    Raises:
        DataError: as `load_texts`.
    """
    with ExitStack() as stack:
        _no_progress_bars()
        # `datasets` knows a local file by its name and mtime only: a file changed by a copy that
        # preserves times (tar, cp -p, rsync -t) would be served as it was before.
        fresh = stack.enter_context(tempfile.TemporaryDirectory()) if _is_files(dataset) else None
        rows = _load(dataset, fresh)
        for column in columns:
            if column not in rows.column_names:
                found = ", ".join(rows.column_names) or "none"
                raise DataError(
                    f"{label_of(dataset)}: no column {column!r}: the columns are {found}"
                )
        yield rows


def token_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    separator: str = "\n\n",
    opening: int | None = None,
) -> Tensor:  # [windows, sequence_length] int64
    """Windows for perplexity: joined, tokenised once with the tokenizer's special tokens, cut.

    Windows do not overlap; the incomplete tail is dropped. Source: the evaluation of the GPTQ
    paper (`"\\n\\n".join(dataset["text"])` of WikiText-2, rows being lines).
    `opening`: a token that every window begins with, instead of the text alone (`opening_token`).

    Raises:
        DataError: fewer tokens than one window.
    """
    ids = tokenizer(separator.join(texts), verbose=False).input_ids
    tokens = torch.tensor(ids, dtype=torch.int64)
    if opening is None:
        return _cut(tokens, sequence_length)
    return _opened(tokens[1:] if ids[:1] == [opening] else tokens, sequence_length, opening)


def calibration_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    opening: int | None = None,
) -> Tensor:  # [at most samples, sequence_length] int64
    """Windows for calibration: `samples` of them, evenly spaced over all documents. `opening`: as
    for `token_windows`.

    Each text is a document with the special tokens that the tokenizer gives it; between two
    documents stands one end-of-text token, where the tokenizer has one. When the texts hold fewer
    windows than `samples`, all of them are returned.

    Raises:
        DataError: fewer tokens than one window.
    """
    return set_aside(document_windows(texts, tokenizer, sequence_length, opening), samples, 0)[0]


def document_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    opening: int | None = None,
) -> Tensor:  # [all that there are, sequence_length] int64
    """The windows that `calibration_windows` takes some of."""
    stream = _document_stream(texts, tokenizer)
    if opening is None:
        return _cut(stream, sequence_length)
    return _opened(stream, sequence_length, opening)


def set_aside(windows: Tensor, samples: int, unseen: int) -> tuple[Tensor, Tensor]:
    """`samples` of the windows [n, …], and others, `unseen` of them but at most an eighth of n;
    both evenly spaced. Where too few others are left, they are taken out of the samples."""
    every = torch.arange(len(windows))
    taken, unseen = evenly_spaced(len(every), samples), min(unseen, len(every) // _SEEN)
    left = every[~torch.isin(every, taken)]
    left = left if len(left) >= unseen else every
    others = left[evenly_spaced(len(left), unseen)]
    return windows[taken[~torch.isin(taken, others)]], windows[others]


_SEEN = 8  # windows, for one that is set aside


def evenly_spaced(count: int, most: int) -> Tensor:
    """At most so many of the places 0 … count - 1, evenly spaced, the first among them."""
    taken = min(count, most)
    return torch.arange(taken) * count // max(taken, 1)


def interleaved(
    sources: Sequence[Tensor],  # [n, length] int64 each
) -> Tensor:  # [all n, length]
    """Windows of several data sets, each spread evenly over the whole, so that any beginning of it
    holds about their shares."""
    places = [
        ((number + 0.5) / len(windows), source, number)
        for source, windows in enumerate(sources)
        for number in range(len(windows))
    ]
    return torch.stack([sources[source][number] for _, source, number in sorted(places)])


def opening_token(
    tokenizer: PreTrainedTokenizerBase, bos: Literal["auto", "always", "never"]
) -> int | None:
    """The begin-of-text token that windows begin with; None: none.

    auto: where the tokenizer puts one before a text. A model that was trained with one before every
    text gives its attention to it, and without it is not the model that anybody runs: Gemma 3 270M
    has a perplexity of 73 on WikiText-2 without and 29 with it (the first 12 windows of 512).

    Raises:
        DataError: `always`, and the tokenizer has no such token.
    """
    token: int | None = tokenizer.bos_token_id
    if bos == "never":
        return None
    if bos == "always":
        if token is None:
            raise DataError("bos is always, but the tokenizer has no begin-of-text token: leave it")
        return token
    return token if token is not None and tokenizer("a").input_ids[:1] == [token] else None


def _opened(tokens: Tensor, sequence_length: int, opening: int) -> Tensor:
    """[windows, sequence_length]: `opening`, then the tokens of a window of one fewer. Where those
    begin with it already (a document does), they and the token after them."""
    length = sequence_length - 1
    windows = _cut(tokens, length)
    opened = torch.cat([torch.full((len(windows), 1), opening), windows], 1)
    for number in (windows[:, 0] == opening).nonzero().flatten().tolist():
        own = tokens[number * length :][:sequence_length]
        opened[number, : len(own)] = own
    return opened


def _document_stream(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Tensor:  # [tokens] int64
    end = tokenizer.eos_token_id
    documents = [text for text in texts if text.strip()]
    parts = [torch.empty(0, dtype=torch.int64)]
    closed = True  # whether an end-of-text token, or nothing, precedes the next document
    for start in range(0, len(documents), _DOCUMENTS_A_CALL):
        batch = documents[start : start + _DOCUMENTS_A_CALL]
        for ids in tokenizer(batch, verbose=False).input_ids:
            # Some tokenizers close every text themselves; for others BOS is the end-of-text token.
            opened = bool(ids) and ids[0] == end
            gap = [end] if end is not None and not closed and not opened else []
            parts.append(torch.tensor(gap + ids, dtype=torch.int64))
            closed = bool(ids) and ids[-1] == end
    return torch.cat(parts)


def _cut(tokens: Tensor, sequence_length: int) -> Tensor:
    """Cut [tokens] into [windows, sequence_length], dropping the tail."""
    windows = len(tokens) // sequence_length
    if windows == 0:
        raise DataError(
            f"the texts hold {len(tokens)} tokens, and one window needs {sequence_length}:"
            " give more text or a smaller sequence_length"
        )
    return tokens[: windows * sequence_length].view(windows, sequence_length)


def _is_files(dataset: TextDataset) -> bool:
    return dataset.path in _FILE_BUILDERS or exists(dataset.path)


def label_of(dataset: TextDataset) -> str:
    """How errors name a data set: by its files where it has some."""
    return ", ".join(_files(dataset)) or dataset.path


def _files(dataset: TextDataset) -> list[str]:
    named = dataset.data_files or []
    return [named] if isinstance(named, str) else named


def _load(dataset: TextDataset, cache_dir: str | None) -> Any:
    """`datasets.load_dataset`, its many errors turned into `DataError`."""
    import datasets  # seconds

    label, files = label_of(dataset), _files(dataset)
    if dataset.path in _FILE_BUILDERS and not files:  # it would take what lies in this folder
        raise DataError(f"{label}: reads files: name them in data_files")
    check_folder(dataset.path)
    patterns = [literal(name) for name in files]
    try:
        return datasets.load_dataset(
            dataset.path,
            dataset.name,
            data_files=patterns or None,
            split=dataset.split,
            revision=dataset.revision,
            cache_dir=cache_dir,
        )
    except Exception as error:  # of datasets, huggingface_hub, fsspec, botocore, pyarrow
        reason = first_line(error.__cause__ or error)
        if empty := [name for name in files if holds_nothing(name)]:
            raise DataError(f"{empty[0]}: the file holds no rows") from error
        if _is_files(dataset):
            raise DataError(f"{label}: {reason}") from error
        if isinstance(error, ValueError):  # unknown split or configuration: the hub answered
            raise DataError(f"{label}: {first_line(error)}") from error
        raise DataError(
            f"{label}: {first_line(error)}: where the hub is out of reach, point data_files to a"
            " local or S3 mirror (path: json, text or parquet)"
        ) from error


def _no_progress_bars() -> None:
    """From here on, in this process: two threads that switch them off and on again undo each
    other's."""
    import datasets

    datasets.disable_progress_bars()
