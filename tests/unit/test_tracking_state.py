"""What is known of a guest's writes from one hvctl to the next: never more than is true, whoever died in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hvctl import codec
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.tracking import CARRIED, STATE, RamTracking, known
from hvctl.errors import DeadlineError, RefusedError
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import Process
from unit.ramhost import DiedError, Kernel, RamHost, connected
from unit.ramlab import Lab, folder, lab

AUTO, UFFD, SOFT, COMPARE = TrackerKind.AUTO, TrackerKind.UFFD, TrackerKind.SOFT_DIRTY, TrackerKind.COMPARE


class Place:
    """The state of one VM's tracking, opened by one hvctl after the other."""

    def __init__(self, root: Path, guest: Lab, host: RamHost) -> None:
        self.folder, self.guest, self.process = root, guest, host.process
        self.kernel: Kernel = host.kernel
        self.opened: list[RamTracking] = []

    def hvctl(self, process: Process | None = None, ram: GuestRam | None = None) -> RamTracking:
        while self.opened:
            self.opened.pop().close()
        return self._open(process, ram)

    def after_death(self) -> RamTracking:
        """The next hvctl, after one that was killed."""
        while self.opened:
            self.opened.pop().let_go()
        return self._open(None, None)

    def _open(self, process: Process | None, ram: GuestRam | None) -> RamTracking:
        self.opened.append(RamTracking(self.folder, process or self.process, ram or self.guest.ram))
        return self.opened[-1]

    def armed(self, base: str = "a") -> RamTracking:
        """RAM is that of the snapshot `base` from here on."""
        tracking = self.hvctl()
        tracking.arm(AUTO)
        tracking.settle(base, inflations=0)
        return tracking


@pytest.fixture
def place() -> Iterator[Place]:
    with folder() as root, lab((40,)) as guest:
        host = RamHost(root, guest)
        host.kernel.write(0, 1, 9)  # Where RAM was never used nothing is looked at.
        with connected(host):
            made = Place(root, guest, host)
            yield made
            host.kernel.fuse = None
            made.hvctl().close()


def written(
    tracking: RamTracking, wanted: TrackerKind = AUTO, inflations: int | None = 0
) -> tuple[str, list[int]] | None:
    found = tracking.written(wanted, inflations)
    return None if found is None else (found[0], found[1].tolist())


def test_a_later_hvctl_knows_what_was_written_since(place: Place) -> None:
    place.armed()
    place.kernel.write(3, 2, 7)
    assert written(place.hvctl()) == ("a", [3, 4])
    state = known(place.folder, place.process)
    assert state is not None
    assert state.base is None, "it was told, and what RAM is now nobody said yet"


def test_who_dies_between_asking_and_saying_leaves_nothing_known(place: Place) -> None:
    """What was told is gone with it: the pages are clean for the tracker, and not as in any snapshot."""
    for deaths in range(12):
        place.kernel.fuse = None
        place.armed()
        place.kernel.write(3, 2, 7)
        tracking = place.hvctl()
        place.kernel.fuse = deaths
        try:
            tracking.written(AUTO, 0)
            tracking.settle("b", inflations=0)
            tracking.close()
            done = True
        except DiedError:
            done = False
        place.kernel.fuse = None
        later = written(place.after_death())
        assert later in ((("b", []),) if done else (None, ("a", [3, 4]), ("b", []))), deaths
        if done:
            break
    assert done
    assert deaths > 4, "it died before and after each effect"


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_made_ready_for_a_pause_that_never_came_is_still_known(place: Place, killed: bool) -> None:
    """Unless it was killed there: then it may have asked."""
    place.armed()
    place.kernel.write(3, 2, 7)
    tracking = place.hvctl()
    tracking.claim()
    said = tracking.expected(AUTO)
    assert said is not None
    assert said[1].tolist() == [3, 4]
    state = known(place.folder, place.process)
    assert state is not None
    assert state.base is None
    later = place.after_death() if killed else place.hvctl()
    assert written(later) == (None if killed else ("a", [3, 4]))


@pytest.mark.parametrize("pages", [[], [0], [5, 6, 39]])
def test_pages_that_are_known_to_differ_are_carried_along(place: Place, pages: list[int]) -> None:
    place.armed().settle("b", np.array(pages, np.int64), inflations=0)
    place.kernel.write(6, 1, 1)
    assert written(place.hvctl()) == ("b", sorted({*pages, 6}))


@pytest.mark.parametrize("damage", ["gone", "cut", "odd", "longer", "folder"])
def test_carried_pages_that_cannot_be_read_are_nothing_known(place: Place, damage: str) -> None:
    place.armed().settle("b", np.array([5, 6], np.int64), inflations=0)
    path = place.folder / CARRIED
    content = path.read_bytes()
    match damage:
        case "gone" | "folder":
            path.unlink()
            if damage == "folder":
                path.mkdir()
        case "cut":
            path.write_bytes(content[:8])
        case "odd":
            path.write_bytes(content[:-3])
        case "longer":
            path.write_bytes(content * 2)
    for again in (lambda t: t.expected(AUTO), lambda t: t.written(AUTO, 0)):
        assert again(place.hvctl()) is None
    state = known(place.folder, place.process)
    assert state is not None
    assert state.base is None
    if damage == "folder":
        path.rmdir()


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ("process", False),
        ("regions", False),
        ("garbage", False),
        ("gone", False),
        ("nothing", True),
    ],
)
def test_only_what_is_of_this_very_process_and_ram_counts(place: Place, change: str, counts: bool) -> None:
    place.armed().close()
    path = place.folder / STATE
    state = codec.load_json(Tracking, path.read_bytes())
    process = place.process
    match change:
        case "process":
            process = replace(process, start_time=process.start_time + 1)
        case "regions":
            path.write_bytes(codec.dump_json(replace(state, regions=(replace(state.regions[0], size=1),))))
        case "garbage":
            path.write_bytes(b'{"base": 7}')
        case "gone":
            path.unlink()
    assert (known(place.folder, process) is not None) is (change in ("regions", "nothing"))
    tracking = place.hvctl(process)
    assert tracking.state.base == ("a" if counts else None)
    assert (written(tracking) is not None) is counts


@pytest.mark.parametrize("wanted", [COMPARE, SOFT])
def test_another_tracker_than_the_one_in_use_knows_nothing(place: Place, wanted: TrackerKind) -> None:
    place.armed()
    assert written(place.hvctl(), wanted) is None
    assert written(place.hvctl(), UFFD) == ("a", [])


@pytest.mark.parametrize(
    ("then", "now", "knows"), [(0, 0, True), (3, 3, True), (3, 4, False), (0, None, False), (None, None, False)]
)
def test_what_was_given_to_the_balloon_makes_it_unknown(
    place: Place, then: int | None, now: int | None, knows: bool
) -> None:
    place.armed().settle("a", inflations=then)
    assert (written(place.hvctl(), inflations=now) is not None) is knows


def test_a_tracker_that_was_wrong_is_not_used_again(place: Place) -> None:
    place.kernel.works = {"uffd", "soft-dirty"}
    place.armed().distrust("an audit found more")
    assert place.kernel.opened == 0
    tracking = place.hvctl()
    assert tracking.state.base is None
    tracking.arm(AUTO)
    assert (tracking.state.kind, tracking.state.disabled) == (SOFT, {"uffd": "an audit found more"})
    with pytest.raises(RefusedError, match="an audit found more"):
        place.hvctl().arm(UFFD)
    tracking = place.hvctl()
    tracking.arm(SOFT)
    tracking.distrust("it missed, too")
    tracking.arm(AUTO)
    assert tracking.state.kind is COMPARE
    assert "uffd: an audit found more" in tracking.state.reason
    assert "soft-dirty: it missed, too" in tracking.state.reason
    tracking.settle("a", inflations=0)
    assert written(tracking) is None, "comparing knows nothing of before"


def test_one_that_lost_its_hold_is_replaced_by_the_next_best(place: Place) -> None:
    place.kernel.works = {"uffd", "soft-dirty"}
    place.armed()
    place.kernel.lost = "the tracker lost its hold."
    tracking = place.hvctl()
    assert written(tracking) is None
    place.kernel.lost = None
    tracking.arm(AUTO)
    assert tracking.state.kind is SOFT
    assert "lost its hold" in tracking.state.disabled["uffd"]


def test_one_that_does_not_work_is_refused_by_name_and_left_out_otherwise(place: Place) -> None:
    place.kernel.works = set()
    tracking = place.hvctl()
    with pytest.raises(RefusedError, match="soft-dirty cannot be used"):
        tracking.arm(SOFT)
    tracking.arm(AUTO)
    assert tracking.state.kind is COMPARE
    assert "no uffd" in tracking.state.reason
    assert "no soft-dirty" in tracking.state.reason
    tracking.arm(COMPARE)
    assert (tracking.state.kind, tracking.state.reason) == (COMPARE, "as asked")
    assert place.kernel.opened == 0


def test_a_qemu_that_cannot_be_stopped_in_time_is_compared(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise DeadlineError("no thread of it could be stopped in a system call.", "try again")

    monkeypatch.setattr("hvctl.adapters.ram.tracking.open_tracker", busy)
    tracking = place.hvctl()
    tracking.foresee(AUTO)
    tracking.arm(AUTO)
    assert tracking.state.kind is COMPARE
    assert "could be stopped" in tracking.state.reason
    tracking.settle("a", inflations=0)
    assert written(place.hvctl()) is None


def test_a_tracker_counts_only_once_it_has_passed_its_probe(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-dirty on a kernel that has it not tells of no page: who died in its probe must not leave it in use."""
    place.kernel.works = {"soft-dirty"}

    def blind(*_: object) -> None:
        raise RefusedError("it did not see a write.")

    for deaths in range(20):
        place.kernel.fuse = deaths
        tracking = place.hvctl()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hvctl.adapters.ram.tracking.self_probe", lambda *_: (place.kernel.burn(), blind()))
            try:
                tracking.arm(AUTO)
                died = False
            except DiedError:
                died = True
            place.kernel.fuse = None
            later = place.after_death()
            later.arm(AUTO)
            assert later.state.kind is COMPARE
            later.settle("a", inflations=0)
            assert written(place.hvctl()) is None
        (place.folder / STATE).unlink()
        if not died:
            break
    assert not died
    assert deaths > 3


def test_what_is_made_ready_before_the_pause_is_not_yet_in_use(place: Place) -> None:
    tracking = place.hvctl()
    tracking.foresee(AUTO)
    assert written(place.hvctl()) is None
    tracking = place.hvctl()
    tracking.arm(AUTO)
    tracking.settle("a", inflations=0)
    assert written(place.hvctl()) == ("a", [])


# --- a snapshot that goes


def test_ram_of_a_snapshot_that_goes_is_that_of_its_parent_but_for_what_it_held(place: Place) -> None:
    place.armed("child").settle("child", np.array([1], np.int64), inflations=0)
    place.kernel.write(9, 1, 1)
    place.hvctl().rebase("child", "parent", np.array([1, 4, 5], np.int64))
    place.kernel.write(10, 1, 1)
    assert written(place.hvctl()) == ("parent", [1, 4, 5, 9, 10])


def test_of_another_snapshot_that_goes_nothing_changes(place: Place) -> None:
    place.armed("mine")
    place.hvctl().rebase("other", None, pg.NONE)
    place.hvctl().rebase("other", "parent", np.array([1], np.int64))
    assert written(place.hvctl()) == ("mine", [])


def test_of_a_snapshot_without_parent_nothing_is_known_after_it(place: Place) -> None:
    place.armed("only")
    place.hvctl().rebase("only", None, np.array([1], np.int64))
    assert written(place.hvctl()) is None


def test_who_dies_while_a_snapshot_goes_leaves_the_old_or_nothing(place: Place) -> None:
    own = np.array([2, 3], np.int64)
    for deaths in range(12):
        place.kernel.fuse = None
        place.armed("child")
        place.kernel.write(9, 1, 1)
        tracking = place.hvctl()
        place.kernel.fuse = deaths
        try:
            tracking.rebase("child", "parent", own)
            died = False
        except DiedError:
            died = True
        place.kernel.fuse = None
        whole = ("parent", [2, 3, 9])
        assert written(place.after_death()) in ((None, ("child", [9]), whole) if died else (whole,))
        if not died:
            break
    assert deaths > 3


def test_ending_leaves_nothing_in_the_process(place: Place) -> None:
    tracking = place.armed()
    tracking.end()
    assert (tracking.state.base, tracking.state.token, tracking.state.kind) == (None, "", COMPARE)
    assert place.kernel.opened == 0
    tracking.end()


def test_resets_are_counted_whatever_tracks(place: Place) -> None:
    place.armed().settle("a", inflations=0, reset=True)
    place.hvctl().arm(COMPARE)
    place.hvctl().settle("a", inflations=0, reset=True)
    place.hvctl().settle("a", inflations=0)
    assert place.hvctl().state.resets == 2
