"""What is measured, in the order in which it is. To add a workload, write its class and enter it here."""

from benchmarks.measuring import Workload
from benchmarks.naming import CreateAndUnlink, Names
from benchmarks.reading import ConvertSparse, Read, ReadAtOnce
from benchmarks.writing import Add, Write, WriteAtOnce

WORKLOADS: tuple[Workload, ...] = (
    Read(),
    Add(),
    Write(),
    CreateAndUnlink(),
    Names(10),
    Names(1_000),
    ReadAtOnce(),
    WriteAtOnce(),
    ConvertSparse(),
    Names(100_000, rounds=3),  # takes longest, so it lacks its last round before others do
)

# The same, to see that it works: seconds in all.
TINY: tuple[Workload, ...] = (
    Read(size_mib=4, random_seconds=0.1),
    Add(sizes_mib=(1, 2)),
    Write(size_mib=2),
    CreateAndUnlink(count=10),
    Names(10),
    Names(1_000),
    ReadAtOnce(size_mib=2, processes=(1, 2)),
    WriteAtOnce(size_mib=2, processes=(1, 2)),
    ConvertSparse(size_mib=64, data_mib=2),
)
