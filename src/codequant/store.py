"""The work folder of a run: results of finished units, each a hashed file, and the manifest that lists them.

    OUT.codequant-work/
      identity.json        what the results depend on: source files, recipe, calibration text, versions
      manifest.jsonl       append-only, one line per event: a unit's record, or its release, with a checksum of the line
      units/KEY.safetensors
      lock                 held while a run is alive

A result is written under a temporary name, synced, renamed and only then recorded, so that a crash at any moment
leaves either a whole recorded file or something that is computed again. Units are pure functions of the identity and
of one another, so a rerun gives the same bytes whatever was lost.
"""

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codequant.errors import InputError

log = logging.getLogger(__name__)
CHUNK = 1 << 22
UMASK = os.umask(0)
os.umask(UMASK)


@dataclass(frozen=True)
class Record:
    """One finished unit."""

    key: str
    sha256: str
    size: int  # bytes
    info: dict[str, Any] = field(default_factory=dict)  # what the report shows; a pure function of the unit
    measured: dict[str, float] = field(default_factory=dict)  # seconds, peak bytes; differs from run to run


def versions() -> dict[str, str]:
    """Of the libraries that decide the bytes of a result."""
    return {name: version(name) for name in ("codequant", "torch", "transformers")}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file under a temporary name, sync and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


class Store:
    """Results by unit key. Any process may read and write result files; only the driver records them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "units"

    def path(self, key: str) -> Path:
        return self.units / f"{key}.safetensors"

    def write(self, key: str, tensors: dict[str, Tensor]) -> tuple[str, int]:
        """Write a unit's tensors; returns (sha256, bytes). Raises OSError where the disk is full or read-only."""
        path = self.path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
            temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            digest, size = file_sha256(temporary), temporary.stat().st_size
            temporary.rename(path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: cannot be written ({error})") from error
        return digest, size

    def read(self, key: str, *names: str) -> dict[str, Tensor]:
        """The named tensors of a result (all without names), copied into memory."""
        with safe_open(self.path(key), "pt") as file:
            return {name: file.get_tensor(name).clone() for name in names or file.keys()}

    def map(self, key: str) -> dict[str, Tensor]:
        """All tensors of a result on memory-mapped pages: what is not looked at is not read."""
        with safe_open(self.path(key), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, no mapping

    def read_one(self, key: str, name: str) -> Tensor:
        return self.read(key, name)[name]


class Ledger:
    """The driver's side of a work folder: identity, lock, manifest, and which results are valid."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.store = Store(folder)
        self.folder = folder
        try:
            self.store.units.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"work folder: {folder} cannot be made ({error.strerror})") from error
        self._lock = lock(folder)
        try:
            check_identity(folder, identity)
            for leftover in (*folder.glob(".*.tmp"), *self.store.units.glob(".*.tmp")):  # of processes that were killed
                leftover.unlink(missing_ok=True)
            self._checked: set[str] = set()
            self.records: dict[str, Record] = self._replay()
            self._manifest = self._manifest_path.open("a")
        except BaseException:
            self._lock.close()
            raise

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.jsonl"

    def _replay(self) -> dict[str, Record]:
        """The last record of every unit. Lines that do not match their checksum are as good as never written."""
        path = self._manifest_path
        if not path.is_file():
            return {}
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # a line that a crash cut off
            os.truncate(path, len(whole))
        records = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            if (record := _parse(line)) is not None:
                records[record.key] = record
            else:
                log.warning("%s: line %d is damaged, what it listed is computed again", path.name, number)
        return records

    def _append(self, record: Record) -> None:
        self.records[record.key] = record
        self._manifest.write(_line(record))
        self._manifest.flush()
        os.fsync(self._manifest.fileno())

    def record(self, record: Record) -> None:
        """List a result that has been written."""
        self._append(record)
        self._checked.add(record.key)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write and list a result that is not a unit's, unless it is there already."""
        if not self.valid(key):
            self.record(Record(key, *self.store.write(key, tensors)))

    def valid(self, key: str) -> bool:
        """Whether a unit's result is there, whole and unchanged; its hash is checked once per run."""
        record = self.records.get(key)
        if record is None or not record.sha256:
            return False
        if key in self._checked:
            return True
        path = self.store.path(key)
        if not path.is_file() or path.stat().st_size != record.size or file_sha256(path) != record.sha256:
            log.warning("%s: result is damaged or missing, computing it again", key)
            return False
        self._checked.add(key)
        return True

    def release(self, key: str) -> None:
        """Delete a result that nothing needs any more; what the report shows of it stays."""
        if (record := self.records.get(key)) is not None and record.sha256:
            self._append(Record(key, "", 0, record.info, record.measured))
            self._checked.discard(key)
        self.store.path(key).unlink(missing_ok=True)

    def infos(self, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, info) of every recorded unit whose key starts with prefix, by key."""
        for key in sorted(self.records):
            if key.startswith(prefix):
                yield key, self.records[key].info

    def close(self) -> None:
        with suppress(OSError):  # a full disk: what could not be appended has been raised already
            self._manifest.close()
        self._lock.close()


def lock(folder: Path) -> IO[str]:
    """Hold a work folder until the result is closed. Raises InputError where another run does."""
    busy = f"work folder: {folder} is in use by another run, wait for it or choose another OUT"
    path = folder / "lock"
    try:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino != os.fstat(file.fileno()).st_ino:  # the other run has just removed its work folder
            raise InputError(busy)
    except (BlockingIOError, FileNotFoundError) as error:
        raise InputError(busy) from error
    except OSError as error:
        raise InputError(f"work folder: {folder} is not writable ({error.strerror})") from error
    return file


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write down what the results depend on, or compare. Raises InputError naming the first thing that differs."""
    path = folder / "identity.json"
    text = json.dumps(identity, indent=2, sort_keys=True)
    if not path.is_file():
        write_atomically(path, text)
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"work folder: {path} is damaged, remove {folder} and start again") from error
    if (change := first_difference(found, json.loads(text))) is not None:
        raise InputError(f"work folder: {folder} belongs to another run ({change}); remove it or choose another OUT")


def first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """Where two JSON values part: `recipe.weights.bits: 4 there, 3 now`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = ((key, found.get(key), wanted.get(key)) for key in sorted(found.keys() | wanted.keys()))
        changes = (first_difference(old, new, f"{name}.{key}" if name else key) for key, old, new in pairs)
        return next((change for change in changes if change is not None), None)
    return None if found == wanted else f"{name}: {_short(found)} there, {_short(wanted)} now"


def _line(record: Record) -> str:
    body = json.dumps(asdict(record), sort_keys=True)
    return json.dumps({"check": zlib.crc32(body.encode()), **asdict(record)}, sort_keys=True) + "\n"


def _parse(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
        check = values.pop("check")
        record = Record(**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if zlib.crc32(json.dumps(asdict(record), sort_keys=True).encode()) == check else None


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:36]}..."
