"""The KV-cache methods: one file each. A method selects what its rows attend to; it never owns the
cache."""
