"""Where the bytes live: pages of encoded tokens, the token table, byte counts, files."""
