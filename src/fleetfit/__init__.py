"""The fleetfit command: a thin front on ansible-runner and on the collection's module_utils."""
