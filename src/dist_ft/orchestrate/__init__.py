"""Everything that talks to Ray: the driver, the worker group, and the checks of a cluster."""
