"""Manifests. A checkpoint exists when its manifest does, and never changes afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath

import xxhash

from dist_ft.checkpoint.tensorfile import hash_file, read_header
from dist_ft.errors import CheckpointError
from dist_ft.layout import FORMAT_VERSION, checkpoint_name
from dist_ft.slices import (
    ADAM_STATE,
    Cursor,
    Environment,
    Fingerprint,
    ParamInfo,
    Probe,
    Setting,
    SliceKey,
    WrittenFile,
    find_gaps,
)
from dist_ft.storage.store import Store
from dist_ft.typed_json import from_json

MANIFEST = "manifest.json"


Pieces = dict[str, dict[str, str]]
"""Parameter → kind → its pieces by start, each as `file:start:count:offset` with the file's index and a byte offset."""


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint.

    Attributes:
        run_id: Name of the run.
        attempt: The attempt that wrote it.
        step: Completed optimizer steps.
        cursor: Where the data stream goes on.
        world_size: Ranks that wrote it.
        zero_stage: Stage it was written at; any stage loads it.
        optimizer_step: Updates that the optimizer has made.
        fingerprint: What it belongs to.
        params: Every trained parameter.
        groups: Settings of each optimizer group at this step.
        schedule: The learning rate's schedule, with `max_steps`.
        files: The slice files, in rank order.
        probe: Logits of a fixed prompt (see `evaluate/held_out.py`), by which an export is checked. The first and the
            last checkpoint of an attempt have them; an export of another one computes them from the slices.
        environment: What bitwise equality depends on; a resume says what differs.
        wandb_id: The run's W&B id, if any.
        pieces: Where every slice lies, so that a rank reads no headers; None in manifests of before.
        optimizer_numbers: What the optimizer keeps for all parameters together besides `optimizer_step`.
            `average_share` says that the weights are an interpolation (see `zero/schedule_free.py`).
    """

    run_id: str
    attempt: int
    step: int
    cursor: Cursor
    world_size: int
    zero_stage: int
    optimizer_step: int
    fingerprint: Fingerprint
    params: tuple[ParamInfo, ...]
    groups: tuple[dict[str, Setting], ...]
    schedule: dict[str, Setting]
    files: tuple[WrittenFile, ...]
    probe: Probe | None
    environment: Environment
    wandb_id: str | None
    pieces: Pieces | None = None
    optimizer_numbers: dict[str, float] = field(default_factory=dict)

    @property
    def directory(self) -> str:
        """Folder of the checkpoint, relative to the run directory."""
        return f"checkpoints/{checkpoint_name(self.step, self.attempt)}"

    @property
    def num_bytes(self) -> int:
        """Bytes of its slice files."""
        return sum(file.num_bytes for file in self.files)

    def changed_conditions(self, world_size: int, zero_stage: int, environment: Environment) -> list[str]:
        """Return `what: then → now` for what bitwise equality needs and is not as it was."""
        then = {"workers": self.world_size, "ZeRO stage": self.zero_stage, **self.environment.conditions()}
        now = {"workers": world_size, "ZeRO stage": zero_stage, **environment.conditions()}
        return [f"{key}: {then.get(key)} → {value}" for key, value in now.items() if then.get(key) != value]

    def find_pieces(self, param: str, kind: str) -> list[SlicePiece]:
        """Return where a parameter's elements of one kind lie, by start, as the piece index says.

        Raises:
            CheckpointError: The index does not say it in its own format.
        """
        assert self.pieces is not None
        found = []
        for text in self.pieces.get(param, {}).get(kind, "").split():
            try:
                index, start, count, offset = map(int, text.split(":"))
                path = f"{self.directory}/{self.files[index].name}"
            except (ValueError, IndexError) as error:
                raise CheckpointError(f"{self.directory}: {text!r} is no piece of {param} ({kind})") from error
            found.append(SlicePiece(start, count, path, offset))
        return found

    def encode(self) -> bytes:
        """Return the file's bytes. What says AdamW is left out, as when there was no other optimizer."""
        data = {"format_version": FORMAT_VERSION, **asdict(self), "fingerprint": self.fingerprint.to_dict()}
        if self.pieces is None:
            del data["pieces"]
        if not self.optimizer_numbers:
            del data["optimizer_numbers"]
        for param in data["params"]:
            if param["state"] == ADAM_STATE:
                del param["state"]
        return (json.dumps({**data, "xxh3": seal(data)}, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Inverse of `encode`.

        Raises:
            CheckpointError: Not a manifest of this format, or it names files outside its folder.
        """
        try:
            raw = json.loads(data)
            if raw["format_version"] != FORMAT_VERSION:
                raise CheckpointError(f"the manifest is not of format {FORMAT_VERSION}; use the dist-ft that wrote it")
            said = raw.pop("xxh3")
            if said != (found := seal(raw)):
                raise CheckpointError(f"the manifest is damaged: xxh3 {found}, it says {said}")
            del raw["format_version"]
            manifest = from_json(cls, raw)
            for name in (file.name for file in manifest.files):
                if PurePosixPath(name).name != name or name in ("", ".", ".."):
                    raise CheckpointError(f"the manifest names {name!r}, which is not a plain file name")
            if manifest.encode() != data:
                raise CheckpointError("the manifest is damaged: it is not written as it was")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a manifest: {error}") from error


def seal(data: object) -> str:
    """Return the xxh3-128 of a manifest's other fields, as canonical JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True)
class SlicePiece:
    """The place of some elements of one parameter: the file, and the byte from which on they lie."""

    start: int
    count: int
    file: str
    offset: int


SliceMap = dict[tuple[str, str], list[SlicePiece]]
"""(parameter, kind) → pieces, by start."""


def map_slices(store: Store, directory: str, names: Sequence[str]) -> SliceMap:
    """Read the headers of slice files and return where everything is."""
    found: SliceMap = {}
    for name in names:
        path = f"{directory}/{name}"
        for text, entry in read_header(store, path).items():
            try:
                key = SliceKey.decode(text)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            piece = SlicePiece(key.start, entry.numel, path, entry.offset)
            found.setdefault((key.param, key.kind), []).append(piece)
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece.start)
    return found


def read_slice_map(store: Store, manifest: Manifest) -> SliceMap:
    """Return where everything is: from the manifest's piece index, or from the files' headers where it has none."""
    if manifest.pieces is None:
        return map_slices(store, manifest.directory, [file.name for file in manifest.files])
    keys = [(param, kind) for param, kinds in manifest.pieces.items() for kind in kinds]
    return {key: manifest.find_pieces(*key) for key in keys}


def index_pieces(slices: SliceMap, files: Sequence[WrittenFile]) -> Pieces:
    """Return the piece index of a manifest whose files hold these slices."""
    numbers = {file.name: number for number, file in enumerate(files)}
    pieces: Pieces = {}
    for (param, kind), found in slices.items():
        texts = [f"{numbers[PurePosixPath(p.file).name]}:{p.start}:{p.count}:{p.offset}" for p in found]
        pieces.setdefault(param, {})[kind] = " ".join(texts)
    return pieces


def check_coverage(params: Sequence[ParamInfo], slices: SliceMap) -> None:
    """Check that every element of every trained parameter is stored exactly once.

    Raises:
        CheckpointError: Naming the parameter, the kind and the elements.
    """
    expected = {(param.name, kind) for param in params for kind in param.kinds}
    if unknown := sorted(set(slices) - expected):
        raise CheckpointError(f"slices of {unknown[0][0]} ({unknown[0][1]}), which is not a trained parameter")
    for param in params:
        for kind in param.kinds:
            pieces = slices.get((param.name, kind), [])
            gap = find_gaps(param.numel, [(piece.start, piece.count) for piece in pieces])
            if gap is not None:
                raise CheckpointError(f"{param.name} ({kind}): {gap}")


def verify_files(store: Store, manifest: Manifest, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Check sizes and hashes of a checkpoint's files; `on_bytes` is called with each number of bytes read.

    Raises:
        CheckpointError: Naming the first file that is missing or damaged.
        ConnectionError: The store does not answer, which says nothing about the files.
    """
    for file in manifest.files:
        path = f"{manifest.directory}/{file.name}"
        try:
            size = store.size(path)
            if size != file.num_bytes:
                raise CheckpointError(f"{path} is damaged: {size} bytes, the manifest says {file.num_bytes}")
            found = hash_file(store, path, file.num_bytes, on_bytes)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if found != file.xxh3:
            raise CheckpointError(f"{path} is damaged: xxh3 {found}, the manifest says {file.xxh3}")


def read_manifests(store: Store, problems: list[str] | None = None) -> Iterator[Manifest]:
    """Yield every readable manifest of a run, whatever its lineage.

    Args:
        store: The run directory.
        problems: Gets a line for each manifest that cannot be read, or that lies in another's folder.

    Raises:
        ConnectionError: The store does not answer.
    """
    for name in store.names("checkpoints"):
        if PurePosixPath(name).name != MANIFEST:
            continue
        try:
            manifest = Manifest.decode(store.read(name))
            if name != f"{manifest.directory}/{MANIFEST}":
                raise CheckpointError(f"it belongs to {manifest.directory}")
            yield manifest
        except FileNotFoundError:
            continue  # retention was quicker
        except ConnectionError:
            raise  # it may be there, and the newest
        except (CheckpointError, OSError) as error:
            if problems is not None:
                problems.append(f"{name}: {error}")
