"""A worker process: HTTP in front, one engine thread behind, hand-over between the two."""
