"""Many small files in few large ones: tar files of a thousand images each, in WebDataset's layout (NAME.png beside NAME.json)."""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fmbseg import files

PACK = 1000
"""Number of images in one tar file."""


class Member(io.BytesIO):
    """The bytes of one file in a tar file; errors call it "TAR/NAME"."""

    name = ""

    def __str__(self) -> str:
        return self.name


class Packs:
    """The tar files in a folder, which need not exist. Where several hold a name, the latest counts; a damaged one is ignored."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, name: str) -> Member | None:
        """A file's bytes by its name; None where no tar file holds it."""
        for look in (lambda: _found.get(self.folder, ([], {}))[1], self._look):  # again where another process may have added it
            path, changed, start, size = look().get(name, (None, 0, 0, 0))
            if path and path.is_file() and path.stat().st_mtime_ns == changed:
                with open(path, "rb") as stream:
                    stream.seek(start)
                    made = Member(stream.read(size))
                made.name = f"{path}/{name}"
                return made
        return None

    def _look(self) -> dict[str, tuple[Path, int, int, int]]:
        there = sorted((path.stat().st_mtime_ns, path) for path in self.folder.glob("*.tar"))
        known, found = _found.get(self.folder, ([], {}))
        if there[: len(known)] != known:
            known, found = [], {}
        for changed, path in there[len(known) :]:  # each once, or a collection would cost the square of its size
            found |= _members(path, changed)
        _found[self.folder] = there, found
        return found

    def add(self, paths: Sequence[Path]) -> None:
        """Move files into one new tar file, which is complete before any of them is removed."""
        target = self.folder / f"{files.digest([path.name for path in paths])}.tar"
        with files.atomic_path(target) as part, tarfile.open(part, "w") as tar:
            for path in paths:
                tar.add(path, path.name, filter=_plain)
        self._look()
        for path in paths:
            path.unlink(missing_ok=True)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0  # the same files give the same bytes
    member.uname = member.gname = ""
    return member


_found: dict[Path, tuple[list[tuple[int, Path]], dict[str, tuple[Path, int, int, int]]]] = {}
"""Of a folder: its tar files that were looked into, and name -> (tar file, its time of change, first byte, number of bytes)."""


@functools.lru_cache(maxsize=4096)
def _members(path: Path, changed: int) -> dict[str, tuple[Path, int, int, int]]:
    try:
        with tarfile.open(path) as tar:
            return {member.name: (path, changed, member.offset_data, member.size) for member in tar}
    except (tarfile.TarError, OSError):
        return {}
