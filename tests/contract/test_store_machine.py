"""Any sequence of openings, closings, refusals and crashes, against a model of ten lines: the ledger is never wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hvctl.adapters.store.store import Store
from hvctl.errors import BusyError, RefusedError
from hvctl.model.allocation import Resources
from hvctl.model.host import FORGET, Ledger, Promise
from hvctl.model.operation import OpState
from tests.contract.stores import begin, database_url, memory_held, migrated_store  # noqa: F401
from tests.postgresql import postgresql_cluster  # noqa: F401

pytestmark = pytest.mark.processes

CAPACITY = 10
VMS = st.sampled_from(["web", "db", "cache"])
SIZES = st.integers(0, CAPACITY + 2)
_hosts = (f"host{n}" for n in itertools.count())


class DiedError(BaseException):
    """Stands for the end of the process: nothing in hvctl may catch it."""


@dataclass
class Expected:
    promised: dict[str, tuple[int, bool]] = field(default_factory=dict)
    open: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """VM to operation and the memory it holds."""

    def entry(self, vm: str) -> tuple[int, bool] | None:
        """Memory and whether it counts, as the ledger should have it."""
        memory, holds = self.promised.get(vm, (None, False))
        held = self.open.get(vm, (0, None))[1]
        if held is not None:
            return max(held, memory or 0), True
        return None if memory is None else (memory, holds)

    def fits(self, vm: str, want: int | None) -> bool:
        entries = [self.entry(other) for other in self.promised | self.open if other != vm]
        others = sum(e[0] for e in entries if e and e[1])
        return want is None or others + max(want, self.promised.get(vm, (0, False))[0]) <= CAPACITY


def admission(vm: str, want: int | None) -> Callable[[Ledger], None]:
    def admit(ledger: Ledger) -> None:
        others = sum(p.resources.memory for p in ledger.promised if p.holds and p.vm_name != vm)
        own = max((p.resources.memory for p in ledger.promised if p.vm_name == vm), default=0)
        if want is not None and others + max(want, own) > CAPACITY:
            raise RefusedError("memory lacks.")

    return admit


def machine(url: str) -> type[RuleBasedStateMachine]:
    class Ledgers(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.host = next(_hosts)  # the others' hosts are in the same database: they must not be seen
            self.stores = [Store(url)]
            self.expected = Expected()

        @property
        def store(self) -> Store:
            return self.stores[-1]

        def teardown(self) -> None:
            for store in self.stores:
                store.close()

        @rule(vm=VMS, want=SIZES | st.none())
        def open(self, vm: str, want: int | None) -> None:
            held = None if want is None else Resources(memory=want)
            ask = {"host": self.host, "held": held, "admit": admission(vm, want)}
            if vm in self.expected.open:
                with pytest.raises(BusyError):
                    begin(self.store, vm, **ask)
            elif not self.expected.fits(vm, want):
                with pytest.raises(RefusedError):
                    begin(self.store, vm, **ask)
            else:
                self.expected.open[vm] = (begin(self.store, vm, **ask).id, want)

        @rule(vm=VMS, how=st.sampled_from(["promise", "keep", "forget"]), part=st.integers(0, 100), holds=st.booleans())
        def close(self, vm: str, how: str, part: int, holds: bool) -> None:
            if vm not in self.expected.open:
                return
            memory, held = self.expected.entry(vm) or (0, False)
            operation, _ = self.expected.open.pop(vm)
            if how == "keep":
                self.store.close_operation(operation, OpState.UNDONE)
            elif how == "forget":
                self.store.close_operation(operation, OpState.DONE, promise=FORGET)
                self.expected.promised.pop(vm, None)
            else:
                # Never more than the operation was admitted with, as the engine does it.
                after = (memory * part // 100, holds and held)
                promise = Promise(f"uuid-{vm}", vm, Resources(memory=after[0]), after[1])
                self.store.close_operation(operation, OpState.DONE, promise=promise)
                self.expected.promised[vm] = after

        @rule(vm=VMS)
        def die_while_opening(self, vm: str) -> None:
            def die(ledger: Ledger) -> None:
                raise DiedError

            with pytest.raises((DiedError, BusyError)):
                begin(self.store, vm, host=self.host, held=Resources(memory=1), admit=die)

        @rule()
        def die_and_start_again(self) -> None:
            self.stores.append(Store(url))

        @invariant()
        def the_ledger_is_right(self) -> None:
            ledger = self.store.ledger(self.host)
            found = {p.vm_name: (p.resources.memory, p.holds) for p in ledger.promised}
            assert found == {
                vm: e for vm in self.expected.promised | self.expected.open if (e := self.expected.entry(vm))
            }
            assert {p.vm_name for p in ledger.promised if p.busy} == found.keys() & self.expected.open.keys()
            assert {o.vm_name: o.id for o in self.store.open_operations(self.host)} == {
                vm: operation for vm, (operation, _) in self.expected.open.items()
            }

        @invariant()
        def nothing_is_promised_twice(self) -> None:
            assert memory_held(self.store.ledger(self.host)) <= CAPACITY

    return Ledgers


def test_the_ledger_after_any_history(store: Store, url: str) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        machine(url),
        settings=settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=checks),
    )
