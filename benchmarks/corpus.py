# SPDX-License-Identifier: Apache-2.0
"""Builds the real-text corpus of the loss studies: tokens on disk, no hub, no account.

    python benchmarks/corpus.py --fetch             download the Debian documentation packages below, then build
    python benchmarks/corpus.py --root /            use the packages that are installed
    python benchmarks/corpus.py ~/books ~/notes     use any folders of text instead (.txt .md .rst .pod .html .py)

Steps: read documents, drop repeated documents and paragraphs, hold whole documents out of *every* source for
validation, train a byte-level BPE tokenizer on training text only, shuffle documents with a fixed seed, encode.

Writes into --out (default `.corpus`):
    train.bin, valid.bin    uint16 token ids, documents joined by <|endoftext|> (id 0)
    tokenizer.json          loads with tokenizers.Tokenizer.from_file
    meta.json               sources, documents, characters and tokens a source, sizes, sha256 of every file

The text keeps its own licences (GPL, PSF, Artistic, PostgreSQL, public domain); nothing of it is committed here.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np

END = "<|endoftext|>"
SHORTEST = 400  # characters; shorter documents are stubs and tables of contents
FOREIGN = 0.10  # share of non-ASCII characters above which a document counts as not English
PIECE = 16_000  # characters of consecutive dictionary entries that make one document


# --- readers: path -> documents ------------------------------------------------------------------------------------


def read_text(path: Path) -> Iterator[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    yield data.decode("utf-8", errors="replace")


class _Text(HTMLParser):
    """Visible text of a page; block elements end a line, script, style and navigation are dropped."""

    BLOCK = frozenset("p div li tr td th h1 h2 h3 h4 h5 h6 pre br dt dd table ul ol blockquote title".split())
    HIDDEN = frozenset("script style head nav footer".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in self.HIDDEN
        self.verbatim += tag == "pre"
        if tag in self.BLOCK:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def read_html(path: Path) -> Iterator[str]:
    parser = _Text()
    parser.feed(next(read_text(path)))
    yield "".join(parser.parts)


def read_dictionary(path: Path) -> Iterator[str]:
    """A dictd database (gzip-compatible): entries are separated by blank lines; PIECE characters make a document."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    entries, size = [], 0
    for entry in re.split(r"\n\n(?=\S)", text):
        entries.append(entry)
        size += len(entry)
        if size >= PIECE:
            yield "\n\n".join(entries)
            entries, size = [], 0
    yield "\n\n".join(entries)


def read_any(path: Path) -> Iterator[str]:
    return read_html(path) if path.suffix in (".html", ".htm") else read_text(path)


# --- sources -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Documents of one Debian package: `patterns` are globs below the file system's root."""

    package: str
    patterns: tuple[str, ...]
    read: Callable[[Path], Iterator[str]] = read_text
    skip: str = r"$^"  # regular expression on the path


DOC = "usr/share/doc"
DEBIAN = (
    Source("linux-doc-6.1", (f"{DOC}/linux-doc-6.1/html/_sources/**/*.rst.txt",), skip=r"/translations/"),
    Source("dict-gcide", ("usr/share/dictd/gcide.dict.dz",), read_dictionary),
    Source("dict-foldoc", ("usr/share/dictd/foldoc.dict.dz",), read_dictionary),
    Source("anarchism", (f"{DOC}/anarchism/html/*.html",), read_html),
    Source("python3.11-doc", (f"{DOC}/python3.11/html/_sources/**/*.rst.txt",)),
    Source("perl-doc", ("usr/share/perl/5*/pod/*.pod",)),
    Source("postgresql-doc-15", (f"{DOC}/postgresql-doc-15/html/*.html",), read_html),
    Source("sqlite3-doc", (f"{DOC}/sqlite3/*.html",), read_html),
    Source("debian-handbook", (f"{DOC}/debian-handbook/html/en-US/*.html",), read_html),
    Source("git-doc", (f"{DOC}/git/html/**/*.txt", f"{DOC}/git-doc/**/*.txt", f"{DOC}/git/**/*.txt")),
    Source("vim-runtime", ("usr/share/vim/vim*/doc/*.txt",)),
    Source("fortunes", ("usr/share/games/fortunes/*",), skip=r"\.(dat|u8)$"),
)
FOLDER_SUFFIXES = (".txt", ".md", ".rst", ".pod", ".html", ".htm", ".py", ".gz")


def fetch(folder: Path) -> Path:
    """Download and unpack (not install) the packages with apt-get and dpkg; returns the root to read from."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *(s.package for s in DEBIAN)], cwd=folder, check=True)
    root = folder / "root"
    for deb in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb.name, "root"], cwd=folder, check=True)
    return root


@dataclass(frozen=True)
class Document:
    source: str
    key: str  # path and position: names the document for the split and the shuffle
    text: str


def read_source(source: Source, root: Path) -> Iterator[Document]:
    for path in sorted({p for pattern in source.patterns for p in root.glob(pattern) if p.is_file()}):
        name = path.relative_to(root).as_posix()
        if not re.search(source.skip, name):
            for i, text in enumerate(source.read(path)):
                yield Document(source.package, f"{name}#{i}", text)


def read_folder(folder: Path) -> Iterator[Document]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in FOLDER_SUFFIXES):
        for i, text in enumerate(read_any(path)):
            yield Document(folder.name, f"{path.relative_to(folder).as_posix()}#{i}", text)


# --- cleaning and splitting ----------------------------------------------------------------------------------------


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def clean(documents: Iterator[Document]) -> list[Document]:
    """English documents without paragraphs seen before: manuals repeat licences, headers and whole pages."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        text = re.sub(r"[ \t]+\n", "\n", document.text.replace("\r", "").replace("\ufffd", ""))
        paragraphs = []
        for paragraph in re.split(r"\n{2,}", text):
            words = " ".join(paragraph.split())
            if len(words) >= 80:
                key = digest(words)
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= SHORTEST and foreign_share(text) <= FOREIGN:
            kept.append(Document(document.source, document.key, text + "\n"))
    return kept


def foreign_share(text: str) -> float:
    return 0.0 if text.isascii() else sum(ord(c) > 127 for c in text) / len(text)


def split(documents: list[Document], held_out: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Whole documents, at most `held_out` of every source's characters by a keyed hash; both parts shuffled."""
    train, valid = [], []
    for source in sorted({d.source for d in documents}):
        own = sorted((d for d in documents if d.source == source), key=lambda d: digest(f"{seed}:{d.key}"))
        budget = held_out * sum(len(d.text) for d in own)
        for document in own:
            chosen = len(document.text) <= budget
            (valid if chosen else train).append(document)
            budget -= chosen * len(document.text)
    random.Random(seed).shuffle(train)
    random.Random(seed + 1).shuffle(valid)
    return train, valid


# --- tokens --------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document], vocab: int, characters: int):
    """Byte-level BPE (GPT-2's pre-tokeniser) on the first `characters` of the shuffled training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    sample, size = [], 0
    for document in documents:
        sample.append(document.text)
        size += len(document.text)
        if size >= characters:
            break
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def encode(tokenizer, documents: list[Document], budget: float) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """Token ids of documents, in order, until `budget` tokens, and what each source gave."""
    end = tokenizer.token_to_id(END)
    ids, total = [], 0
    sources: dict[str, dict[str, int]] = {}
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        for document, encoding in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            if total >= budget:
                return np.concatenate(ids), sources
            tokens = np.array([*encoding.ids, end], dtype=np.uint16)
            ids.append(tokens)
            total += len(tokens)
            own = sources.setdefault(document.source, {"documents": 0, "characters": 0, "tokens": 0})
            own["documents"] += 1
            own["characters"] += len(document.text)
            own["tokens"] += len(tokens)
    return np.concatenate(ids), sources


def package_versions(root: Path) -> dict[str, str]:
    """Versions from the .deb names beside a fetched root; empty for installed packages and folders."""
    return dict(unquote(deb.name).split("_")[:2] for deb in sorted(root.parent.glob("*.deb")))


def build(args: argparse.Namespace) -> dict:
    if args.folders:
        found = (document for folder in args.folders for document in read_folder(folder))
        versions = {}
    else:
        root = fetch(Path(tempfile.mkdtemp(prefix="corpus-"))) if args.fetch else args.root
        found = (document for source in DEBIAN for document in read_source(source, root))
        versions = package_versions(root)
    documents = clean(found)
    if not documents:
        raise SystemExit("corpus: no documents found; run with --fetch, or name folders of text")
    train, valid = split(documents, args.held_out, args.seed)
    if not valid:
        raise SystemExit("corpus: no document is small enough to hold out; give more files or raise --held-out")
    print(f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} M characters", flush=True)

    tokenizer = train_tokenizer(train, args.vocab, args.tokenizer_characters)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    meta: dict = {"vocab": tokenizer.get_vocab_size(), "seed": args.seed, "packages": versions, "splits": {}}
    for name, part, budget in (("train", train, args.train_tokens), ("valid", valid, math.inf)):
        ids, sources = encode(tokenizer, part, budget)
        ids.tofile(args.out / f"{name}.bin")
        meta["splits"][name] = {"tokens": len(ids), "documents": sum(s["documents"] for s in sources.values()),
                                "sources": sources}  # fmt: skip
        print(f"{name}: {len(ids)} tokens", flush=True)
    if meta["splits"]["train"]["tokens"] < args.train_tokens:
        print(f"warning: too little text for {args.train_tokens} training tokens", flush=True)
    meta["files"] = {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name in ("train.bin", "valid.bin", "tokenizer.json")
        for path in [args.out / name]
    }
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of text to use instead of Debian's packages")
    parser.add_argument("--fetch", action="store_true", help="download the Debian packages (apt-get download)")
    parser.add_argument("--root", type=Path, default=Path("/"), help="root below which the packages lie")
    parser.add_argument("--out", type=Path, default=Path(".corpus"))
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--train-tokens", type=int, default=21_100_000)
    parser.add_argument("--held-out", type=float, default=0.032, help="share of every source kept for validation")
    parser.add_argument("--tokenizer-characters", type=int, default=30_000_000)
    parser.add_argument("--seed", type=int, default=1)
    build(parser.parse_args())


if __name__ == "__main__":
    main()
