"""Hydra's configuration groups of the `hvpopt` command: one folder a group, one YAML an option."""
