"""A tree of layers of RAM against a plain model: bytes of each snapshot."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters.ram import layers
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.layers import INDEX, INHERITED, RAM, ZERO, Chain, Layer, Writer
from hvctl.adapters.ram.pages import CHUNK, PAGE
from hvctl.errors import RefusedError
from unit.ramlab import folder

PAGES = CHUNK + 90
UNLIMITED = 1 << 40
untimed = settings(deadline=None, max_examples=50)
# What a layer says of some pages: zero, or a content; of all others nothing.
says = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=40)


@dataclass
class Tree:
    """Snapshots by number, each with what it holds of every page; 0 has no parent."""

    root: Path
    parents: list[int | None] = field(default_factory=list)
    model: list[np.ndarray] = field(default_factory=list)

    def folder(self, number: int) -> Path:
        return self.root / str(number)

    def chain(self, number: int | None) -> list[Path]:
        found = []
        while number is not None:
            found.append(self.folder(number))
            number = self.parents[number]
        return found

    def add(self, parent: int | None, said: dict[int, int], limit: int = UNLIMITED) -> int:
        number = len(self.parents)
        self.folder(number).mkdir()
        writer = Writer(self.folder(number), PAGES, base=parent is not None, limit=limit)
        try:
            put(writer, said)
            writer.finish()
        finally:
            writer.close()
        held = self.model[parent].copy() if parent is not None else np.zeros(PAGES, np.int64)
        for page, content in said.items():
            held[page] = content
        self.parents.append(parent)
        self.model.append(held)
        return number

    def holds(self, number: int) -> np.ndarray:
        with Chain(self.chain(number), PAGES) as chain:
            return contents(chain)


def put(writer: Writer, said: dict[int, int]) -> None:
    pages = np.array(sorted(said), np.int64)
    source = np.repeat(np.arange(4, dtype=np.int64), PAGE // 8).reshape(4, -1)
    of = np.array([said[p] for p in pages.tolist()], np.int64)
    # 0 is a page of zeros that needs no content, and so is one that is full of them.
    address = np.where((of == 0) & (pages % 2 == 0), 0, source.ctypes.data + of * PAGE)
    writer.put(pages, address)


def contents(chain: Chain) -> np.ndarray:
    """Of each page its content: every word of it, or else -1."""
    address = chain.locate(pg.span(0, PAGES))
    own = np.zeros((PAGES, PAGE // 8), np.int64)
    filled = np.flatnonzero(address)
    pg.read(own.ctypes.data + filled * PAGE, address[filled])
    assert (chain.nonzero() == own.any(axis=1)).all()
    used = np.zeros(PAGES, np.bool_)
    for start, end in pg.chunk_ranges(chain.used()).tolist():
        used[start // PAGE : end // PAGE] = True
    assert not own[~used].any(), "outside what is used everything is zero"
    return np.where((own == own[:, :1]).all(axis=1), own[:, 0], -1)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int | None, dict[int, int]]]:
    made: list[tuple[int | None, dict[int, int]]] = [(None, draw(says))]
    for number in range(1, draw(st.integers(1, 6))):
        # A second root is another chain that shares nothing.
        parent = draw(st.none() | st.integers(0, number - 1) | st.integers(0, number - 1))
        made.append((parent, draw(says)))
    return made


@untimed
@given(trees())
def test_each_snapshot_of_a_tree_holds_what_it_was(made: list[tuple[int | None, dict[int, int]]]) -> None:
    with folder() as root:
        tree = Tree(root)
        for parent, said in made:
            number = tree.add(parent, said)
            assert (tree.folder(number) / RAM).stat().st_size == sum(c > 0 for c in said.values()) * PAGE
        for number, held in enumerate(tree.model):
            assert (tree.holds(number) == held).all()


@untimed
@given(trees(), st.data())
def test_what_may_differ_holds_all_that_differs(
    made: list[tuple[int | None, dict[int, int]]], data: st.DataObject
) -> None:
    with folder() as root:
        tree = Tree(root)
        for parent, said in made:
            tree.add(parent, said)
        one, other = (data.draw(st.integers(0, len(made) - 1)) for _ in range(2))
        found = set(layers.differing(tree.chain(one), tree.chain(other), PAGES).tolist())
        assert set(np.flatnonzero(tree.model[one] != tree.model[other]).tolist()) <= found
        if one == other:
            assert not found
        if set(tree.chain(one)) & set(tree.chain(other)):
            said = {p for f in {*tree.chain(one)} ^ {*tree.chain(other)} for p in made[int(f.name)][1]}
            assert found == said, "and of related ones only what either says"


@untimed
@given(trees(), st.data())
def test_wiping_what_nobody_sees_changes_nothing_that_anybody_sees(
    made: list[tuple[int | None, dict[int, int]]], data: st.DataObject
) -> None:
    with folder() as root:
        tree = Tree(root)
        for parent, said in made:
            tree.add(parent, said)
        gone = data.draw(st.integers(0, len(made) - 1))
        children = [n for n, p in enumerate(tree.parents) if p == gone]
        layers.wipe_unseen(tree.folder(gone), [tree.folder(n) for n in children], PAGES)
        for number in range(len(made)):
            if number != gone:
                assert (tree.holds(number) == tree.model[number]).all()
        shown = {p for n in children for p in range(PAGES) if p not in made[n][1]}
        kept = sum(1 for page, content in made[gone][1].items() if content and page in shown)
        ram = tree.folder(gone) / RAM
        assert ram.stat().st_blocks * 512 == kept * PAGE, "what nobody can reach is given back"


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_page_stays_as_long_as_one_of_the_children_has_none_of_its_own(without: int) -> None:
    with folder() as root:
        tree = Tree(root)
        parent = tree.add(None, {5: 1, 6: 2})
        children = [tree.add(parent, {6: 3} if n == without else {5: 3, 6: 3}) for n in range(3)]
        layers.wipe_unseen(tree.folder(parent), [tree.folder(n) for n in children], PAGES)
        assert [int(tree.holds(n)[5]) for n in children] == [1 if n == children[without] else 3 for n in children]
        assert (tree.folder(parent) / RAM).stat().st_blocks * 512 == PAGE, "the other one goes"


@untimed
@given(says, says, says)
def test_what_is_stored_again_is_overwritten(
    first: dict[int, int], second: dict[int, int], below: dict[int, int]
) -> None:
    """As the copy under the pause does with what the live copy had."""
    with folder() as root:
        tree = Tree(root)
        tree.add(None, below)
        place = root / "twice"
        place.mkdir()
        writer = Writer(place, PAGES, base=True, limit=UNLIMITED)
        put(writer, first)
        put(writer, second)
        assert writer.finish() == (place / RAM).stat().st_size
        writer.close()
        with Chain([place, tree.folder(0)], PAGES) as chain:
            wanted = tree.model[0].copy()
            for page, content in {**first, **second}.items():
                wanted[page] = content
            assert (contents(chain) == wanted).all()
        layer = Layer(place, PAGES)
        assert layer.own().tolist() == sorted({*first, *second})
        layer.close()


# --- limits and damage


@pytest.mark.parametrize("room", [0, 1, 5, 9])
def test_a_layer_takes_no_more_than_there_is(room: int) -> None:
    said = dict.fromkeys(range(10), 1)
    with folder() as root:
        tree = Tree(root)
        with pytest.raises(RefusedError, match="more than"):
            tree.add(None, said, limit=room * PAGE + PAGE - 1)
        assert (root / "0" / RAM).stat().st_size <= room * PAGE
        assert not (root / "0" / INDEX).exists(), "nothing that could be taken for whole"
    with folder() as root:
        tree = Tree(root)
        tree.add(None, said, limit=10 * PAGE)
        assert (tree.holds(0) == tree.model[0]).all()


def test_zeros_and_what_is_there_already_take_nothing() -> None:
    with folder() as root:
        writer = Writer(root, PAGES, base=False, limit=2 * PAGE)
        put(writer, {1: 1, 3: 2})
        put(writer, {1: 3, 3: 1, 5: 0, 7: 0})
        with pytest.raises(RefusedError):
            put(writer, {9: 1})
        writer.close()


def damaged(root: Path, change: str) -> None:
    index = np.fromfile(root / INDEX, np.int32)
    match change:
        case "a row that is not there":
            index[3] = 9
        case "less than nothing":
            index[3] = INHERITED - 1
        case "far too much":
            index[3] = np.iinfo(np.int32).max
        case "cut":
            index = index[:-1]
        case "longer":
            index = np.append(index, np.int32(ZERO))
        case "empty":
            index = index[:0]
        case "ram cut":
            (root / RAM).write_bytes((root / RAM).read_bytes()[: 2 * PAGE - 1])
        case "ram empty":
            (root / RAM).write_bytes(b"")
    index.tofile(root / INDEX)


@pytest.mark.parametrize(
    "change",
    ["a row that is not there", "less than nothing", "far too much", "cut", "longer", "empty", "ram cut", "ram empty"],
)
def test_a_damaged_layer_is_refused_before_anything_is_read_from_it(change: str) -> None:
    with folder() as root:
        tree = Tree(root)
        tree.add(None, {1: 1, 2: 2, 3: 3})
        tree.add(0, {2: 3})
        damaged(root / "0", change)
        for read in (lambda: Layer(root / "0", PAGES), lambda: Chain(tree.chain(1), PAGES)):
            with pytest.raises(RefusedError, match="damaged"):
                read()


def test_a_chain_that_cannot_be_opened_leaves_nothing_open() -> None:
    with folder() as root, ExitStack():
        tree = Tree(root)
        tree.add(None, {1: 1})
        tree.add(0, {2: 3})
        damaged(root / "0", "ram empty")
        before = {p.name for p in Path("/proc/self/fd").iterdir()}
        maps = Path("/proc/self/maps").read_text().count(str(root))
        for _ in range(3):
            with pytest.raises(RefusedError):
                Chain(tree.chain(1), PAGES)
        assert {p.name for p in Path("/proc/self/fd").iterdir()} == before
        assert Path("/proc/self/maps").read_text().count(str(root)) == maps
