"""Files that may change while a service runs: certificates, lists of keys."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How often files are looked at; two looks must agree before contents count as wrong.
LOOK_INTERVAL_S = 2.0


class FollowedFiles(Generic[T]):
    """What `parse` makes of some files' contents, made anew when these change.

    `value` is the newest that could be made: contents that are gone, half written or wrong leave it
    as it was, and are logged once. Contents are compared, not times, so it does not matter how they
    change (Kubernetes swaps links).
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[Sequence[bytes]], T]) -> None:
        """`parse` raises ValueError for what is wrong, without what is secret; so does this."""
        self._paths = tuple(paths)
        self._parse = parse
        self._contents = self._read()
        self.value = self._made(self._contents)
        # What is wrong with the files as they are, and at how many looks in a row it was.
        self._wrong, self._num_wrong = "", 0

    def look(self) -> None:
        """Take new contents, if there are any."""
        try:
            contents = self._read()
            value = None if contents == self._contents else self._made(contents)
        except ValueError as error:
            self._note_wrong(str(error))
            return
        self._wrong, self._num_wrong = "", 0
        if value is not None:
            self._contents, self.value = contents, value
            logger.info("event=files_changed files=%s", self._names)

    async def follow(self, interval_s: float = LOOK_INTERVAL_S) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                self.look()
            except Exception:
                logger.exception("event=look_failed files=%s", self._names)

    @property
    def _names(self) -> str:
        return ",".join(map(str, self._paths))

    def _read(self) -> tuple[bytes, ...]:
        try:
            return tuple(path.read_bytes() for path in self._paths)
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error

    def _made(self, contents: tuple[bytes, ...]) -> T:
        try:
            return self._parse(contents)
        except ValueError as error:
            raise ValueError(f"{self._names}: {error}") from error

    def _note_wrong(self, error: str) -> None:
        """Say it, once, when it was so at the last look too: files are not all written at once."""
        self._num_wrong = self._num_wrong + 1 if error == self._wrong else 1
        self._wrong = error
        if self._num_wrong == 2:
            logger.error("event=files_refused kept=the_old_ones error=%s", error)


@contextlib.asynccontextmanager
async def following(
    files: FollowedFiles[T], interval_s: float = LOOK_INTERVAL_S
) -> AsyncIterator[None]:
    """Look at them until the block ends."""
    task = asyncio.create_task(files.follow(interval_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
