"""Saved disks in the place of overlays: all of them or none, wherever it is interrupted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvctl.adapters.disks import diskplace
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.archive import Placement

LOAD = "0123abcd"


class Killed(BaseException):
    """As kill -9: nothing that hvctl does about errors happens."""


class Place:
    def __init__(self, folder: Path) -> None:
        self.disks = folder / "disks"
        self.disks.mkdir(mode=0o711)
        saved = folder / "saved"
        saved.mkdir()
        self.note = self.disks / "load.json"
        self.overlays = [self.disks / "root.qcow2", self.disks / "data.qcow2"]
        for overlay in self.overlays:
            overlay.write_text(f"old {overlay.name}")
            overlay.chmod(0o640)
            (saved / overlay.name).write_text(f"saved {overlay.name}")
        self.placements = [Placement(str(saved / o.name), str(o)) for o in self.overlays]

    @property
    def paths(self) -> Sequence[str]:
        return [str(o) for o in self.overlays]

    def place(self) -> None:
        diskplace.place(self.note, LOAD, self.placements)

    def take_back(self) -> None:
        diskplace.take_back(self.note, LOAD, self.paths)

    def release(self) -> None:
        diskplace.release(self.note, LOAD, self.paths)

    def content(self) -> set[str]:
        return {o.read_text().split()[0] for o in self.overlays}

    def names(self) -> list[str]:
        return sorted(p.name for p in self.disks.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


ALONE = ["data.qcow2", "root.qcow2"]


def test_they_are_placed_and_released(place: Place) -> None:
    for _ in range(2):
        place.place()
        assert place.content() == {"saved"}
        assert diskplace.kept(place.note) == LOAD
    assert {o.stat().st_mode & 0o777 for o in place.overlays} == {0o640}
    for _ in range(2):
        place.release()
        assert (place.content(), place.names(), diskplace.kept(place.note)) == ({"saved"}, ALONE, None)
    place.take_back()
    assert place.content() == {"saved"}, "what was released cannot be taken back"


def test_they_are_taken_back_with_what_the_guest_would_have_had(place: Place) -> None:
    before = [o.stat().st_ino for o in place.overlays]
    place.place()
    for overlay in place.overlays:
        overlay.write_text("written by somebody since")
    for _ in range(2):
        place.take_back()
        assert (place.content(), place.names()) == ({"old"}, ALONE)
    assert [o.stat().st_ino for o in place.overlays] == before


LINK, REPLACE, UNLINK = (os, "link"), (Path, "replace"), (Path, "unlink")
COPY, NOTE = (diskplace, "copy"), (diskplace, "replace_file")
# What each does, and how often.
CALLS = {
    "place": {COPY: 2, NOTE: 1, LINK: 2, REPLACE: 3},
    "take_back": {REPLACE: 2, UNLINK: 3},
    "release": {UNLINK: 3},
}
KILLS = [
    pytest.param(verb, call, nth, after, id=f"{verb}-{call[1]}-{nth}-{'after' if after else 'before'}")
    for verb, calls in CALLS.items()
    for call, count in calls.items()
    for nth in range(1, count + 1)
    for after in (False, True)
]


def _killing(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, nth: int, after: bool) -> None:
    real = getattr(owner, name)
    left = [nth]

    def call(*args: object, **named: object) -> object:
        left[0] -= 1
        if left[0] == 0 and not after:
            raise Killed
        done = real(*args, **named)
        if left[0] == 0:
            raise Killed
        return done

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("verb", "call", "nth", "after"), KILLS)
def test_killed_anywhere_it_is_all_or_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, verb: str, call: tuple[object, str], nth: int, after: bool
) -> None:
    if verb != "place":
        place.place()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _killing(patch, *call, nth, after)
        getattr(place, verb)()
    if verb == "release" and diskplace.kept(place.note) is None:
        place.release()
        assert (place.content(), place.names()) == ({"saved"}, ALONE)
        return
    place.take_back()
    assert (place.content(), place.names()) == ({"old"}, ALONE)
    place.place()
    assert place.content() == {"saved"}


def test_without_room_nothing_is_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = diskplace.copy, [1]

    def full(source: Path, target: Path) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        real(source, target)

    monkeypatch.setattr(diskplace, "copy", full)
    with pytest.raises(HvctlError, match="No space left"):
        place.place()
    assert (place.content(), place.names()) == ({"old"}, ALONE)


def test_a_link_is_not_replaced(place: Place) -> None:
    real = place.overlays[0].rename(place.disks / "real")
    place.overlays[0].symlink_to(real)
    with pytest.raises(RefusedError, match="not a plain file"):
        place.place()
    assert place.overlays[0].is_symlink()


def test_where_others_can_write_nothing_is_put(place: Place) -> None:
    place.disks.chmod(0o777)
    with pytest.raises(RefusedError, match="others"):
        place.place()
    assert (place.content(), place.names()) == ({"old"}, ALONE)


def test_a_reset_that_was_interrupted_comes_first(place: Place) -> None:
    for suffix in ("old", "reset"):
        place.overlays[1].with_name(f"data.qcow2.{suffix}").write_text("")
    with pytest.raises(RefusedError, match="reset of the disk"):
        place.place()
    assert place.content() == {"old"}


def test_another_load_is_not_disturbed(place: Place) -> None:
    place.place()
    with pytest.raises(RefusedError, match="another load"):
        diskplace.place(place.note, "other", place.placements)
    for act in (diskplace.take_back, diskplace.release):
        act(place.note, "other", place.paths)
    assert diskplace.kept(place.note) == LOAD
    place.take_back()
    assert place.content() == {"old"}
