"""People's own rows: read from files, laid out by a chat template, labelled where answers stand."""
