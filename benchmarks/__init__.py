"""Benchmarks and experiments; see RESULTS.md for what they found and NOTES.md for what was learned on the way.

pytest benchmarks/                  timings, contenders against each other
python -m benchmarks.report         RESULTS.md and its plots from stored runs
python -m benchmarks.experiments    the paper's comparisons, trained and measured
"""
