"""A site of hvctl on the real host for each module, a booted VM for those that share one, and the check that every
test leaves the host as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from host.loaded import Loaded
from host.marked import Marked, marked
from host.outside import Guest
from host.site import Site, real_site
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine


@pytest.fixture(scope="module")
def site(scrubbed_environment: None) -> Iterator[Site]:
    with real_site() as made:
        yield made
        left = {what: found for what, found in made.inventory().items() if any(found)}
        assert left == {}, left


@pytest.fixture(scope="module")
def vm(site: Site) -> Iterator[Guest]:
    """A running VM: 1 of 4 vCPUs, 256 MiB of 1 GiB, a disk `data` and a NIC."""
    with site.created("--start") as guest:
        yield guest


@pytest.fixture(scope="module")
def engine(site: Site) -> Iterator[Engine]:
    """hvctl within this process."""
    roomy = replace(site.settings, cpu_overcommit=1000.0, memory_overcommit=1000.0)
    with open_engine(roomy) as made:
        yield made


@pytest.fixture(scope="module")
def command(site: Site) -> Loaded:
    return site.loaded


@pytest.fixture(scope="module")
def pair(site: Site) -> Iterator[Marked]:
    """A running VM whose RAM, disks and own memory are told apart."""
    with marked(site) as made:
        yield made


@pytest.fixture
def nothing_left(site: Site, request: pytest.FixtureRequest) -> Iterator[None]:
    """What is there after a test is what was there before it, a shared VM included."""
    if "vm" in request.fixturenames:
        request.getfixturevalue("vm")
    before = site.inventory()
    yield
    assert site.inventory() == before
