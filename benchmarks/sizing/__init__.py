"""How good the sizing is: every row of the table in docs/sizing_results.md, by ``python -m benchmarks.sizing``."""
