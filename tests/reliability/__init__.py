"""Hard to break: generated models, damaged files, kills, threads, moves."""
