"""Tasks whose samples are read from a file that the user has: `path=` first, the hub only if asked."""
