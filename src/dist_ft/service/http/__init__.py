"""The HTTP side of the service: routes, authentication, limits."""
