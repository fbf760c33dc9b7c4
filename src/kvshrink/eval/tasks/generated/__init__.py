"""Tasks whose samples are made here, from a seed and bundled text: no file and no network is needed."""
