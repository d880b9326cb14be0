"""The index of cuts: which documents are cut and how often, built once from lengths and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sip.data.cut import CutRule, plan_cuts
from megatron_sip.data.documents import Corpus
from megatron_sip.errors import DataError

_LOG = logging.getLogger(__name__)
_VERSION = 1


@dataclass(frozen=True)
class CutIndex:
    """`documents` [used] are those with cuts, `cuts` [used] how many each offers an epoch, both int64."""

    documents: npt.NDArray[np.int64]
    cuts: npt.NDArray[np.int64]
    skipped: dict[str, int]

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.cuts)

    @property
    def num_cuts(self) -> int:
        """Cuts of one epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, cut: int) -> tuple[int, int]:
        """Document and ordinal of a cut, counted along the corpus."""
        row = int(np.searchsorted(self._ends, cut, side="right"))
        return int(self.documents[row]), cut - int(self._ends[row] - self.cuts[row])

    @cached_property
    def _owners(self) -> npt.NDArray[np.int64]:
        return np.repeat(self.documents, self.cuts)

    def owners(self) -> npt.NDArray[np.int64]:
        """`[num_cuts]` the document of each cut."""
        return self._owners


def load_or_build(corpus: Corpus, rule: CutRule, fingerprint: str, cache_path: str | None) -> CutIndex:
    """The index from the cache, else built and put there.

    Raises:
        DataError: `cache_path` was given and cannot be written.
    """
    key = index_key(fingerprint, rule)
    for folder in _folders(corpus, cache_path):
        found = _read(folder / f"cuts-{key}.npz", corpus.num_documents)
        if found is not None:
            return found
    cuts, skipped = plan_cuts(corpus.lengths, rule)
    documents = np.flatnonzero(cuts).astype(np.int64)
    index = CutIndex(documents, cuts[documents], skipped)
    _store(index, f"cuts-{key}.npz", _folders(corpus, cache_path), required=cache_path is not None)
    return index


def index_key(fingerprint: str, rule: CutRule) -> str:
    """Name of the index of this corpus under this rule."""
    # The longest prefix changes what a cut shows, not which cuts there are, but one key for all is simpler to trust.
    text = json.dumps([_VERSION, fingerprint, rule.settings()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _folders(corpus: Corpus, cache_path: str | None) -> list[Path]:
    """Where the index may lie: the folder that was named, else beside the corpus, else the user's cache folder."""
    if cache_path is not None:
        return [Path(cache_path)]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return [Path(corpus.prefixes[0]).resolve().parent / "cut_index", Path(base) / "megatron_sip"]


def _read(path: Path, num_documents: int) -> CutIndex | None:
    """The cached index, or None if there is none or it is damaged (it is then built again)."""
    try:
        with np.load(path, allow_pickle=False) as data:
            documents, cuts = data["documents"], data["cuts"]
            skipped = json.loads(str(data["skipped"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _LOG.warning("the cached index %s cannot be read (%s); it is built again", path, error)
        return None
    sound = documents.shape == cuts.shape and documents.ndim == 1 and bool((cuts > 0).all())
    if not sound or (len(documents) and not 0 <= int(documents.min()) <= int(documents.max()) < num_documents):
        _LOG.warning("the cached index %s does not fit the corpus; it is built again", path)
        return None
    return CutIndex(documents.astype(np.int64), cuts.astype(np.int64), skipped)


def _store(index: CutIndex, name: str, folders: list[Path], required: bool) -> None:
    """Write under a temporary name and rename: processes that build at once replace the file by an equal one."""
    problem: OSError | None = None
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=name, suffix=".tmp", delete=False) as stream:
                try:
                    np.savez(
                        stream, documents=index.documents, cuts=index.cuts, skipped=np.array(json.dumps(index.skipped))
                    )
                    stream.close()
                    Path(stream.name).replace(folder / name)
                except BaseException:
                    Path(stream.name).unlink(missing_ok=True)
                    raise
            return
        except OSError as error:
            problem = error
    if required:
        raise DataError(f"--data-cache-path {folders[0]} cannot be written ({problem}); name a folder that can")
    _LOG.warning("the index of cuts is not cached (%s); --data-cache-path names a folder for it", problem)
