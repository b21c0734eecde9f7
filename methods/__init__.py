"""The methods: one file each, found by name and imported only when asked for."""
