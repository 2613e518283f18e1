"""Attacks on runs and on prepared data, for scripts/torture.py and tests/test_torture.py.

children    commands in forked copies of a process that has imported everything
faults      file operations counted, and made to fail or to kill the process at the n-th
world       a tiny model, its data, and what undisturbed runs of it give
kills, disks, mutations, hostile, signals, numbers, configs, soak      the attacks
"""
