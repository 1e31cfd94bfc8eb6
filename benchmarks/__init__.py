"""Timings: ratios within one run, after warm-up, with medians; one JSON line a row."""
