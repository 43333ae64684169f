"""The benchmark: workloads, an open-loop client, schemes that it starts itself, and a report that says why."""
