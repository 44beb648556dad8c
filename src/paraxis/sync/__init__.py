"""Synchronisation rules: when and how replicas agree. A file each; `rule` says what one is, and finds them here."""
