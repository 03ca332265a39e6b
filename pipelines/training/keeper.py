"""Ends what a Ray of this machine leaves, once the training is gone: `python -m pipelines.training.keeper FOLDER`.

Ray's servers die with the process that started them, but its workers and agents notice that later, the last of them
after a minute, and its folder stays. Standard input is a pipe from the training, which ends with it, however that goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from cigpose.files.atomic import ClaimedError, claimed

PREFIX, RAY = "cigpose-ray-", "ray"
"""Of the folder's name; the folder inside for Ray, which lets everybody into what it makes."""
WAIT_S = 10.0


@contextlib.contextmanager
def kept() -> Iterator[Path]:
    """A folder for a Ray that is started in its `ray`; both are gone soon after the block, or this process, has ended.

    It is its owner's alone.
    """
    _clear_dead()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_place()))
    with claimed(folder / "lock", f"a training in {folder}"), contextlib.ExitStack() as last:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "pipelines.training.keeper", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C, or the end of the group, is not for it
        )
        last.callback(_dismiss, keeper)
        yield folder


def _dismiss(keeper: subprocess.Popen[bytes]) -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(WAIT_S)


def _place() -> str:
    """As Ray chooses it: names of sockets are short, and the temporary folders of macOS are not."""
    return os.environ.get("RAY_TMPDIR") or ("/tmp" if sys.platform == "darwin" else tempfile.gettempdir())


def _clear_dead() -> None:
    """Remove folders whose training and keeper died at once, as when the power goes."""
    for folder in Path(_place()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ClaimedError):
            if (folder / "lock").is_file() and folder.stat().st_uid == os.getuid():
                with claimed(folder / "lock", "a training"):
                    shutil.rmtree(folder, ignore_errors=True)


def end_all_in(folder: Path, but: int) -> None:
    """Kill every process of this user that is at work in a folder, but for one, and those that they start meanwhile."""
    mine = os.getuid()
    for _ in range(3):
        found = [process for process in psutil.process_iter(["uids"]) if process.info["uids"].real == mine]
        found = [process for process in found if process.pid != but and _is_at_work_in(process, folder)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=WAIT_S / 5)


def _is_at_work_in(process: psutil.Process, folder: Path) -> bool:
    """Whether it has a file open there, as all that Ray starts has its log.

    Its environment would be no mark, nor its command line: Ray writes titles over both.
    """
    with contextlib.suppress(psutil.Error, OSError):
        return any(Path(file.path).is_relative_to(folder) for file in process.open_files())
    return False


def keep(folder: Path) -> None:
    """Wait for the end of standard input, then clear up."""
    training = os.getppid()
    sys.stdin.buffer.read()
    end_all_in(folder / RAY, but=training if training == os.getppid() else 0)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
