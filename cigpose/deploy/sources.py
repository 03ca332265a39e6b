"""What `cigpose predict` was asked for: pictures and videos, each with a name of its own in the results."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}

STDIN = "-"
_BEGINNINGS = {  # of pictures' files
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}

MANIFEST = "cigpose-predict.json"
"""The file by which a folder of results is known."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One picture or video."""

    path: Path
    name: Path
    """Of its results; no other source has it."""
    drawing: Path
    """The drawn picture or video, relative to the folder of drawings: in its own format where that can be written."""

    @property
    def shown(self) -> str:
        """The name as text, whatever bytes it has."""
        return utf8(self.name)

    def stamp(self) -> dict[str, int]:
        """What changes when the file does."""
        status = self.path.stat()
        return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


@dataclass
class Media:
    """All sources, in the order of the arguments."""

    pictures: list[Source] = field(default_factory=list)
    videos: list[Source] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """A sentence for each file that is named like a picture but cannot be opened safely."""


def utf8(path: str | Path) -> str:
    """A path as UTF-8 text: bytes that are none are written as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_arguments(given: Sequence[str], stdin: Callable[[], bytes], folder: Path) -> tuple[list[Path], list[str]]:
    """The files and folders that the arguments mean.

    Args:
        given: paths; patterns such as `holiday/*.jpg` or `**/*.png` (of pictures and videos; of folders where there
            are none), if no file has that name; and `-`: what
            comes in at standard input is a picture, or else the names of files, folders and patterns, a line each.
        stdin: reads standard input to its end.
        folder: where a picture from standard input is put, as `stdin.jpg`.

    Returns: the paths, and what makes the same arguments again: paths and patterns in full, and the picture's digest.

    Raises:
        FileNotFoundError: nothing has a pattern's form.
        ValueError: standard input is neither a picture nor names.
    """
    paths, asked = [], []
    for item in given:
        if item != STDIN:
            found, name = _meant(item)
            paths += found
            asked.append(name)
            continue
        content = stdin()
        ending = next((ending for start, ending in _BEGINNINGS.items() if content.startswith(start)), None)
        if ending:
            paths.append(folder / f"stdin{ending}")
            paths[-1].write_bytes(content)
            os.utime(paths[-1], (0, 0))  # the same bytes are the same picture
            asked.append(f"{STDIN}:{hashlib.sha256(content).hexdigest()}")
            continue
        lines = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
        if not lines or b"\0" in content:
            raise ValueError("standard input: neither a picture nor names of files, a line each.")
        for line in lines:
            found, name = _meant(line)
            paths += found
            asked.append(name)
    return paths, asked


def _meant(text: str) -> tuple[list[Path], str]:
    path = Path(text)
    if os.path.lexists(path) or not glob.has_magic(text):
        return [path], utf8(path.resolve())
    found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    known = [name for name in found if name.suffix.lower() in PICTURES | VIDEOS and not name.is_dir()]
    known = known or [name for name in found if name.is_dir()]  # not both: `**` gives a folder and what is in it
    if not known:
        raise FileNotFoundError(f"{utf8(text)}: no picture, folder or video has a name of this form.")
    return known, utf8(os.path.abspath(text))


def find_media(sources: Sequence[Path]) -> Media:
    """The pictures and videos of the arguments.

    The name of a picture is its file's, or, in a folder, its path from there; with several arguments the folder's name
    stands before it. A name that is taken gets a number: `imgs`, `imgs-2`. Results of earlier predictions within a
    folder are passed over.

    Args:
        sources: pictures, folders, videos. The same one twice counts once.

    Raises:
        FileNotFoundError: one does not exist, or a folder holds no picture.
        ValueError: one is neither a file nor a folder, such as a pipe or a device.
    """
    if missing := [utf8(source) for source in sources if not source.exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such picture, folder or video.")
    distinct = list({source.resolve(): source for source in sources}.values())
    media, taken = Media(), {"poses", Path(MANIFEST).stem}  # the names of our own files
    for source in distinct:
        if source.is_dir():
            label = Path() if len(distinct) == 1 else Path(_free(taken, source.resolve().name, ""))
            _add_folder(media, source, label)
        elif not source.is_file():
            raise ValueError(f"{utf8(source)}: neither a file nor a folder. Give a picture, a folder or a video.")
        elif source.suffix.lower() in VIDEOS:
            media.videos.append(_source(source, taken, source.stem, "", ".mp4"))
        else:
            drawn = "" if source.suffix.lower() in PICTURES else ".jpg"
            media.pictures.append(_source(source, taken, source.stem, source.suffix, source.suffix + drawn))
    return media


def _source(path: Path, taken: set[str], stem: str, ending: str, drawn_ending: str) -> Source:
    stem = _free(taken, stem, ending, drawn_ending)
    return Source(path=path, name=Path(stem + ending), drawing=Path(stem + drawn_ending))


def _free(taken: set[str], stem: str, *endings: str) -> str:
    """`stem` or, where a name made of it is taken, `stem-2` and so on."""
    for number in itertools.count(1):
        candidate = stem if number == 1 else f"{stem}-{number}"
        claims = {utf8(candidate + ending) for ending in endings}
        if not claims & taken:
            taken |= claims
            return candidate
    raise AssertionError


def _add_folder(media: Media, folder: Path, label: Path) -> None:
    count, names = 0, set[str]()
    for path in _pictures_below(folder, media.refused):
        count += 1
        name = label / path.relative_to(folder)
        source = Source(path=path, name=name, drawing=name)
        if not path.is_file():
            media.refused.append(f"{utf8(path)}: not a regular file.")
        elif source.shown in names:
            media.refused.append(f"{utf8(path)}: another picture has this name but for bytes that are not UTF-8.")
        else:
            names.add(source.shown)
            media.pictures.append(source)
    if not count:
        known = " ".join(sorted(PICTURES))
        raise FileNotFoundError(f"{utf8(folder)}: no pictures in it; known endings: {known}.")


def _pictures_below(folder: Path, refused: list[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=lambda err: refused.append(str(err))):
        folders[:] = sorted(name for name in folders if not os.path.lexists(os.path.join(parent, name, MANIFEST)))
        yield from _pictures_of(Path(parent), files)


def _pictures_of(parent: Path, files: Iterable[str]) -> Iterator[Path]:
    return (parent / name for name in sorted(files) if os.path.splitext(name)[1].lower() in PICTURES)
