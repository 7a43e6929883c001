"""What the benchmarks measure, and how: subjects, checks, times, tables and plots."""
