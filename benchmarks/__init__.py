"""Benchmarks and experiments; RESULTS.md has their results, NOTES.md what else was measured and tried.

pytest benchmarks/                  timings of contenders against each other
python -m benchmarks.report         writes RESULTS.md, TABLES.md and their plots from stored runs
python -m benchmarks.regression     measures a few ratios again and compares them with a stored run
python -m benchmarks.roofline       predicts the time of a sampling step on GPUs
python -m benchmarks.experiments    the paper's comparisons: trains models and measures their quality
"""

import engine  # noqa: F401 (first: it answers Ctrl-C in one line)
