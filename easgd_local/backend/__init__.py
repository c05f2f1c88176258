"""The list of operations that rules are written in; `cpu` defines them, one line each."""
