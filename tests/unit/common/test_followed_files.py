"""Files that change: the newest that can be read is in use."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.common.followed_files import FollowedFiles, following


def number(contents: Sequence[bytes]) -> int:
    return int(contents[0])


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    files = FollowedFiles([path], number)
    first = files.value
    files.look()
    assert files.value is first
    path.write_text("2")
    files.look()
    assert files.value == 2


def test_a_file_behind_links_that_are_swapped_is_read_again(tmp_path: Path) -> None:
    # As Kubernetes lays out a Secret: the file, a link to it through `..data`, which is replaced.
    for version in ("1", "2"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "n").write_text(version)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "n").symlink_to("..data/n")
    files = FollowedFiles([tmp_path / "n"], number)
    (tmp_path / "..next").symlink_to("..2")
    os.replace(tmp_path / "..next", tmp_path / "..data")
    files.look()
    assert files.value == 2


def test_wrong_contents_keep_the_old_and_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    files = FollowedFiles([path], number)
    path.write_text("secret")
    # Half written: the next look finds it whole.
    files.look()
    assert not caplog.records
    for _ in range(3):
        files.look()
    assert files.value == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "files_refused" in caplog.text
    path.unlink()
    for _ in range(3):
        files.look()
    assert "cannot read" in caplog.text
    assert files.value == 1
    path.write_text("3")
    files.look()
    assert files.value == 3


def test_wrong_contents_at_the_start_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "n"
    with pytest.raises(ValueError, match=f"cannot read {path}: No such file"):
        FollowedFiles([path], number)
    path.write_text("x")
    with pytest.raises(ValueError, match=str(path)):
        FollowedFiles([path], number)


async def test_files_are_followed_while_the_block_lasts(tmp_path: Path) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    files = FollowedFiles([path], number)
    async with following(files, interval_s=0.01):
        path.write_text("2")
        async with asyncio.timeout(10):
            while files.value != 2:
                await asyncio.sleep(0.01)
