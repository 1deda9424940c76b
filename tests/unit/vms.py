"""VMs, allocations and changes for property tests."""

from hypothesis import strategies as st

from hvctl.model.allocation import KEEP, Allocation, Change, DiskChange, DiskLimit, NicChange, NicLimit
from hvctl.model.vm import Accel, Disk, Nic, Process, State, Vm

MIB = 1 << 20
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
TARGETS = ("vda", "vdb")
MAX_VCPUS = 8
MAX_MEMORY = 1024 * MIB

limits = st.none() | st.integers(8_000, 10**9)
counts = st.none() | st.integers(1, 10**6)
memory = st.integers(16, 1024).map(lambda m: m * MIB)
quota = st.none() | st.integers(1, 800)
weight = st.none() | st.integers(1, 10000)

allocations = st.builds(
    Allocation,
    vcpus=st.integers(1, MAX_VCPUS),
    memory=memory,
    cpu_quota=quota,
    cpu_weight=weight,
    nics=st.tuples(*(st.builds(NicLimit, mac=st.just(m), inbound=limits, outbound=limits) for m in MACS)),
    disks=st.tuples(*(st.builds(DiskLimit, target=st.just(t), iops=counts, rate=counts) for t in TARGETS)),
)

keep = st.just(KEEP)
changes = st.builds(
    Change,
    vcpus=keep | st.integers(1, MAX_VCPUS),
    memory=keep | memory,
    cpu_quota=keep | quota,
    cpu_weight=keep | weight,
    nics=st.lists(
        st.builds(NicChange, nic=st.sampled_from((None, *MACS)), inbound=keep | limits, outbound=keep | limits),
        max_size=2,
    ).map(tuple),
    disks=st.lists(
        st.builds(DiskChange, disk=st.sampled_from((None, *TARGETS)), iops=keep | counts, rate=keep | counts),
        max_size=2,
    ).map(tuple),
)


def vm_with(allocation: Allocation, state: State = State.RUNNING) -> Vm:
    return Vm(
        uuid="00000000-0000-0000-0000-000000000001",
        name="a",
        state=state,
        reason="booted",
        accel=Accel.TCG,
        persistent=True,
        process=Process(7, 8, "boot") if state.active else None,
        allocation=allocation,
        max_vcpus=MAX_VCPUS,
        max_memory=MAX_MEMORY,
        disks=tuple(Disk(t, f"d{t}", f"/d/{t}", "qcow2", True) for t in TARGETS),
        nics=tuple(Nic(m, "virtio", "br0", f"tap{i}") for i, m in enumerate(MACS)),
        record=None,
    )
