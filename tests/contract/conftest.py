"""The same tests for the fake host and the real one: whoever passes may stand where ports.py is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvctl.model.vm import VmSpec
from hvctl.ports import Host
from tests.contract.outside import BOTH, FakeOutside, Outside, made


@pytest.fixture(scope="module", params=BOTH)
def outside(
    request: pytest.FixtureRequest, scrubbed_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outside]:
    if request.param == "fake":
        fake = FakeOutside(tmp_path_factory.mktemp("fake"))
        yield fake
        fake.check_nothing_left()
        return
    from tests.contract.real import real_outside

    with real_outside() as real:
        yield real


@pytest.fixture(scope="module")
def host(outside: Outside) -> Host:
    return outside.host


@pytest.fixture(scope="module")
def running(outside: Outside) -> Iterator[str]:
    """A booted VM that the tests of a module share: each leaves it running as it found it."""
    with made(outside, outside.spec(), start=True) as vm:
        yield vm


@pytest.fixture
def defined(outside: Outside) -> Iterator[VmSpec]:
    """A VM that is off."""
    spec = outside.spec()
    with made(outside, spec):
        yield spec
