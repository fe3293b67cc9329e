"""The one door to Ray: driver, elastic trainer, supervisors, and the plain processes they start."""
