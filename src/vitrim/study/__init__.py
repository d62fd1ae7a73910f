"""Many models or many runs: compare, sweep, tabulate."""
