"""Evaluation: rate-distortion, baselines, benchmarks and reports."""
