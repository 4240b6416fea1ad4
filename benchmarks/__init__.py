"""imgfs beside a bare directory and its peers: `make bench`, or `python -m benchmarks --help`.

Where to look, and where to add something:

    contenders.py    who is measured: a new one is an entry in CONTENDERS
    workloads.py     what is measured: a new one is a class in reading.py, writing.py or naming.py, and an entry here
    measuring.py     who takes their turn when, until the time is up
    figures.py       rows of figures, their medians and ratios; results.json
    report.py        results.md, and the part of README.md that shows the main results
    plots.py         the plots
    machine.py       what it ran on, and the versions of everything
    loopback.py      a peer: the smallest loopback on fusepy and on mfusepy
    adding.py        how an image is added so that its digests are known
    programs.py, fio.py, memory.py  tools of the workloads

An absolute time means little on a shared machine. So the contenders take turns: every round measures each of them
once, on a fresh mount and in fresh directories, and what is compared are the ratios within a round.
"""
