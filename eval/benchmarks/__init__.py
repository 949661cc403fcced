"""Benchmarks whose results stand in eval/results; run as `python -m compand.eval.benchmarks.NAME`."""
