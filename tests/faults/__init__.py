"""The fault matrix: real processes, one fault at a time, each many times."""
